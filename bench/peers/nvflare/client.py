"""The client's half: a training script on NVFlare's Client API. Site n plays the n-th device of every round's cohort."""

from __future__ import annotations

import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel
from setups import setup_of
from task import job_of, settings

flare.init()
how, place = settings(), int(flare.get_site_name().removeprefix("site-")) - 1
job, setup = job_of(how.job), setup_of(how)
model = setup.model(how)
while flare.is_running():
    received = flare.receive()
    rows = job.rows(received.current_round, place)
    setup.load(model, received.params)
    setup.train(model, rows, how)
    flare.send(FLModel(params=setup.copied(model), meta={"NUM_STEPS_CURRENT_ROUND": len(rows)}))

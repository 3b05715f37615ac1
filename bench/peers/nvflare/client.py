"""The client's half: a training script on NVFlare's Client API. Site n plays the n-th device of every round's cohort."""

from __future__ import annotations

import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel
from task import job_of, load, model_of, settings, state, train

flare.init()
how, place = settings(), int(flare.get_site_name().removeprefix("site-")) - 1
job, model = job_of(how.job), model_of(how)
model.train()
while flare.is_running():
    received = flare.receive()
    rows = job.rows(received.current_round, place)
    load(model, received.params)
    loss = train(model, rows, how)
    flare.send(FLModel(params=state(model), metrics={"loss": loss}, meta={"NUM_STEPS_CURRENT_ROUND": len(rows)}))

"""NVFlare's simulator: ten resident sites, a FedAvg controller, and a training script on the Client API.

Each simulated site is a process of its own. With as many threads as sites the processes stay, with fewer the simulator starts a new
process, which imports PyTorch and loads the model, for every task. So the peer gets ten resident sites that play the ten devices of
each round's cohort, and not a hundred sites of which ten are drawn.

As documented, NVIDIA/NVFlare: examples/hello-world/hello-pt: a training script on the Client API whose loop is PyTorch's own, and as many
threads of the simulator as sites, which is what SimEnv takes unless told otherwise (nvflare/recipe/sim_env.py). Tensors are exchanged as
PyTorch's, as in examples/hello-world/hello-huggingface/job.py. That example, the one with PEFT, trains by a patched Trainer which keeps
AdamW's state over rounds and writes checkpoints, and starts a second process for each site: other work, so it is not taken.
Neither sets the threads of PyTorch; each site has one here, in both set-ups, as in NVFlare's examples that do set them
(examples/advanced/collab/pt_async_cifar10/trainer.py): ten processes with all cores each get in each other's way.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from controller import TimedFedAvg
from nvflare import FedJob
from nvflare.client.config import ExchangeFormat
from nvflare.fuel.utils.constants import FrameworkType
from nvflare.job_config.script_runner import ScriptRunner
from task import job_of, settings

if __name__ == "__main__":
    how = settings()
    sites = len(job_of(how.job).cohort(0))
    os.chdir(Path(__file__).parent)
    job = FedJob(name="bench", min_clients=sites)
    job.to_server(TimedFedAvg(num_clients=sites, num_rounds=how.rounds))
    job.to_clients(ScriptRunner("client.py", framework=FrameworkType.PYTORCH, server_expected_format=ExchangeFormat.PYTORCH))
    with tempfile.TemporaryDirectory() as folder:
        job.simulator_run(folder, n_clients=sites, threads=sites)

"""Flower's simulation: a ServerApp with its FedAvg, a ClientApp with PEFT, 100 virtual nodes on Ray.

Flower draws which ten of its nodes train; the n-th of them plays the n-th device of the job's cohort, so that the work is the job's.

As documented, flwrlabs/flower: examples/quickstart-huggingface and framework/docs/source/tutorial-quickstart-huggingface.rst, which are
what its documentation shows first for transformers, and about classification; what they lack is PEFT, and that is as in
examples/flowertune-llm/flowertune_llm/client_app.py. Both load the model for every message, and both leave a ClientApp's resources at
Flower's default, two CPUs and no GPU (framework/docs/source/how-to-run-simulations.rst). FlowerTune trains by a Trainer for text
generation; the loop here is the quickstart's, which has less to set up for each device. Tuned: Ray keeps its workers alive between
messages and the model is cached in each, so that only the first message pays for loading it; CPUs as many as the trial finds best.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from setups import setup_of
from task import job_of, settings, start_of, write

client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def fit(message: Message, context: Context) -> Message:
    """Local training on one device."""
    how, config = settings(), message.content["config"]
    job, setup = job_of(how.job), setup_of(how)
    model = setup.model(how)
    setup.load(model, message.content["arrays"].to_torch_state_dict())
    rows = job.rows(config["server-round"] - 1, config["place"])
    setup.train(model, rows, how)
    arrays, metrics = ArrayRecord(dict(setup.state(model))), MetricRecord({"num-examples": len(rows)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round begins, gives every node its place in the cohort and keeps what the first round made."""

    def __init__(self, cohort: int, nodes: int) -> None:
        """Flower draws a share of the nodes that it knows of, and a server that starts faster than they do would draw fewer than ten."""
        share = cohort / nodes
        super().__init__(fraction_train=share, fraction_evaluate=0.0, min_train_nodes=cohort, min_available_nodes=nodes)
        self.began: list[float] = []
        self.after_first = None

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """As FedAvg."""
        self.began.append(time.perf_counter())
        for place, message in enumerate(super().configure_train(server_round, arrays, config, grid)):
            told = ConfigRecord({**message.content["config"], "place": place})
            content = RecordDict({"arrays": message.content["arrays"], "config": told})
            yield Message(content, dst_node_id=message.metadata.dst_node_id, message_type=message.metadata.message_type)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg. A device that failed is an error here."""
        replies = list(replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(replies)} devices failed: {failed[0]}")
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.after_first = self.after_first or arrays
        return arrays, metrics


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    how = settings()
    job = job_of(how.job)
    strategy = Timed(len(job.cohort(0)), job.settings["devices"])
    strategy.start(grid, ArrayRecord(start_of(how)), num_rounds=how.rounds)
    marks = [*strategy.began, time.perf_counter()]
    write(how, [after - before for before, after in itertools.pairwise(marks)], strategy.after_first.to_torch_state_dict())


if __name__ == "__main__":
    how = settings()
    cpus = {"client_resources": {"num_cpus": how.threads, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, job_of(how.job).settings["devices"], backend_config=cpus)

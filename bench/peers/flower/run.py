"""Flower's simulation: a ServerApp with its FedAvg, a ClientApp with PEFT, 100 virtual nodes on Ray.

Ray keeps its workers alive between messages and the model is cached in each, so that only the first message pays for loading it.
Flower draws which ten of its nodes train; the n-th of them plays the n-th device of the job's cohort, so that the work is the job's.
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
from task import job_of, load, model_of, settings, state, train, write

client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def fit(message: Message, context: Context) -> Message:
    """Local training on one device."""
    how, config = settings(), message.content["config"]
    job, model = job_of(how.job), model_of(how)
    model.train()
    load(model, message.content["arrays"].to_torch_state_dict())
    rows = job.rows(config["server-round"] - 1, config["place"])
    loss = train(model, rows, how)
    metrics = MetricRecord({"loss": loss, "num-examples": len(rows)})
    return Message(RecordDict({"arrays": ArrayRecord(state(model)), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round begins, gives every node its place in the cohort and keeps what the first round made."""

    def __init__(self, nodes: float) -> None:
        super().__init__(fraction_train=nodes, fraction_evaluate=0.0)
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
    strategy = Timed(len(job.cohort(0)) / job.settings["devices"])
    strategy.start(grid, ArrayRecord(state(model_of(how))), num_rounds=how.rounds)
    marks = [*strategy.began, time.perf_counter()]
    write(how, [after - before for before, after in itertools.pairwise(marks)], strategy.after_first.to_torch_state_dict())


if __name__ == "__main__":
    how = settings()
    cpus = {"client_resources": {"num_cpus": how.threads, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, job_of(how.job).settings["devices"], backend_config=cpus)

"""The server's half: NVFlare's FedAvg, which starts from the job's tensors, notes when each round begins and writes the result."""

from __future__ import annotations

import itertools
import time

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_opt.pt.fedavg import PTFedAvg
from task import settings, start_of, write


class TimedFedAvg(PTFedAvg):
    """FedAvg over all sites. Nothing is saved to disk between rounds."""

    def __init__(self, num_clients: int, num_rounds: int) -> None:
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, persistor_id="")
        self.began, self.after_first = [], None

    def load_model(self) -> FLModel:
        """The trained tensors only: the frozen base stays where it is."""
        return FLModel(params=start_of(settings()))

    def sample_clients(self, num_clients: int | None = None) -> list[str]:
        """As FedAvg; every round begins with it."""
        self.began.append(time.perf_counter())
        return super().sample_clients(num_clients)

    def save_model(self, model: FLModel) -> None:
        """Keep what the first round made."""
        self.after_first = self.after_first or dict(model.params)

    def run(self) -> None:
        """As FedAvg, then the result."""
        super().run()
        self.began.append(time.perf_counter())
        write(settings(), [after - before for before, after in itertools.pairwise(self.began)], self.after_first)

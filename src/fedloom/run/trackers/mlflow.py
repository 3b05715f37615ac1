"""MLflow: a SQLite store in the run's folder, for ``mlflow ui --backend-store-uri sqlite:///RUN/mlflow/mlflow.db``.

``MLFLOW_TRACKING_URI`` names another store, ``MLFLOW_EXPERIMENT_NAME`` another experiment than ``fedloom``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping

from mlflow.entities import Experiment, Metric, Param, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fedloom.run.tracking import ALWAYS, Subject

TAG = "fedloom.run"
"""The tag by which a run is found again."""

BATCH, LONGEST = 100, 6000
"""Parameters that MLflow takes at a time, and characters of each."""


class MLflow:
    """A :class:`~fedloom.run.tracking.Tracker`. A round is one batch, which MLflow's SQLite store keeps in one transaction."""

    def __init__(self, subject: Subject) -> None:
        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        local = f"sqlite:///{subject.folder.resolve() / 'mlflow.db'}"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or local
        self.client = MlflowClient(tracking_uri=uri)
        artifacts = (subject.folder.resolve() / "artifacts").as_uri() if uri == local else None
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fedloom", artifacts)
        run = self._run(experiment.experiment_id, subject)
        self.run = run.info.run_id
        lacking = [Param(key, str(value)[:LONGEST]) for key, value in subject.settings.items() if key not in run.data.params]
        for start in range(0, len(lacking), BATCH):
            self.client.log_batch(self.run, params=lacking[start : start + BATCH])

    def known(self) -> Collection[int]:
        """Those in the store."""
        return {metric.step for metric in self.client.get_metric_history(self.run, ALWAYS)}

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """One batch of metrics."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(key, number, now, round) for key, number in numbers.items()])

    def end(self, round: int, numbers: Mapping[str, float]) -> None:
        """Metrics at the last round, those that there are not yet."""
        there = self.client.get_run(self.run).data.metrics
        self.round(round, {key: number for key, number in numbers.items() if key not in there})

    def close(self, failed: bool) -> None:
        """Say how it ended."""
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")

    def _experiment(self, name: str, artifacts: str | None) -> Experiment:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found
        try:
            return self.client.get_experiment(self.client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            found = self.client.get_experiment_by_name(name)  # another process may have made it meanwhile
            if found is None:
                raise
            return found

    def _run(self, experiment: str, subject: Subject) -> Run:
        found = self.client.search_runs([experiment], f"tags.`{TAG}` = '{subject.id}'", ViewType.ALL, max_results=1)
        if not found:
            return self.client.create_run(experiment, run_name=subject.name, tags={TAG: subject.id})
        self.client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0]

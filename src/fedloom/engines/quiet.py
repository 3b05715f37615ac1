"""Switches Flower's telemetry, update check and run-time installs off, and its log down to warnings. Whoever imports Flower imports this
first: Flower looks at the switches while it is imported."""

from __future__ import annotations

import logging
import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"

try:
    import flwr  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the Flower engine needs the extra 'flower': pip install -e '.[flower]' in Fedloom's folder", name="flwr"
    ) from error

logging.getLogger("flwr").setLevel(logging.WARNING)  # it tells every request

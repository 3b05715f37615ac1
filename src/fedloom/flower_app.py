"""The door of a Flower deployment: the app that a SuperNode runs for a Fedloom client.

It is made by :func:`client_app` from whatever makes the node's host; the in-memory federation of ``engines/flower.py`` runs the
very same app. Telemetry, update check and run-time installs are off from the moment this module is imported.
"""

from __future__ import annotations

from fedloom.engines.flower import client_app

__all__ = ["client_app"]

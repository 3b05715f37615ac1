"""Whether the Hugging Face Hub can be asked at all. Its client would retry for half a minute without a network."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

ENDPOINT = "https://huggingface.co"


def reachable() -> bool:
    """Whether the Hub's host (``HF_ENDPOINT``, if set) has an address or a proxy stands before it, and ``HF_HUB_OFFLINE`` is not set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT", ENDPOINT)).hostname, 443))
    except OSError:
        return False

"""``python -m fedloom`` is ``fedloom``."""

from __future__ import annotations

from fedloom.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

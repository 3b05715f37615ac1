"""A worker process: ``python -m fedloom.run.worker SOCKET`` builds the world that its order describes and answers for its devices.

Nothing heavy is imported before it listens: a worker ends when the process that started it does, also while it is still starting.
The order is written by :func:`fedloom.run.world.order_of`.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.run.experiment import Experiment
    from fedloom.run.world import World


def main() -> int:
    """Start, or tell why not; then serve until nobody asks any more."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own, about calls between them
    from fedloom.client.store import ClientStore
    from fedloom.engines.workers import ordered, refuse, serve
    from fedloom.telling import in_full

    line, order = ordered(sys.argv[-1])
    try:
        world = built(order)
    except Exception as error:
        refuse(line, in_full(error))
        return 1
    serve(line, world.host(ClientStore(None)))
    return 0


def end_with_parent() -> None:
    """End this process when the other end of its standard input, to which nobody ever writes, is closed by whatever."""
    os.read(0, 1)
    os._exit(1)


def built(order: Mapping[str, Any]) -> World:
    """The world of the order.

    Raises:
        ExperimentError: the order's experiment is not what it was where it was written.
        DataError, ModelError, TextError, AdapterError: whatever is wrong, with the mend.
    """
    from fedloom.data.tasks import DataError
    from fedloom.run.world import build

    experiment = ordered_experiment(order)
    world = build(experiment)
    if world.fingerprint() != order["data"]:
        raise DataError(f"the data '{experiment.data}' changed while the run went on; restore it")
    return world


def ordered_experiment(order: Mapping[str, Any]) -> Experiment:
    """The experiment of the order: its JSON, the file of its method if that is not the package's, and the digest it must come to.

    Raises:
        ExperimentError: it is not what it was where the order was written.
    """
    from fedloom.run import recipes
    from fedloom.run.errors import ExperimentError
    from fedloom.run.experiment import from_json

    name = order["experiment"]["method"]["name"]
    kinds = {name: recipes.resolve(f"{order['recipe']}:{name}").kind} if order["recipe"] else None
    experiment = from_json(order["experiment"], kinds)
    if experiment.digest() != order["digest"]:
        raise ExperimentError(
            f"method '{name}' is another in a process of its own; it must hold nothing that is neither in its file nor ours"
        )
    return experiment


if __name__ == "__main__":
    sys.exit(main())

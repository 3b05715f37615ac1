"""Clients' states that lie on their devices: the server keeps their names, and by them decides which state is a device's state."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.client.store import ClientStore, State, read_index


class Elsewhere:
    """The index of states that lie on their devices: names, and nothing behind them. Otherwise as :class:`ClientStore`."""

    def __init__(self) -> None:
        self._fresh: dict[int, str] = {}
        self._index: dict[int, str] = {}

    def load(self, client: int) -> State:
        """Nothing: it is not here."""
        return {}, {}

    def name(self, client: int) -> str:
        """The state that is the client's, as the server sees it; empty when it has none."""
        return self._fresh.get(client, self._index.get(client, ""))

    def committed(self, client: int) -> str:
        """The state that was the client's at the last commit, which a server that is killed goes back to; empty when it had none."""
        return self._index.get(client, "")

    def take(self, client: int, name: str) -> None:
        """Make ``name`` the client's state."""
        self._fresh[client] = name

    def commit(self) -> dict[str, str]:
        """The index: client id as text -> name of its state."""
        self._index |= self._fresh
        self._index = {client: name for client, name in self._index.items() if name}
        self._fresh.clear()
        return {str(client): name for client, name in sorted(self._index.items())}

    def restore(self, index: Mapping[str, str]) -> None:
        """Forget everything since the commit that returned ``index``.

        Raises:
            StoreError: an entry is not the name of a state of its client.
        """
        read = read_index(index)
        self._fresh.clear()
        self._index = read

    def forget(self) -> None:
        """Forget everything since the last commit."""
        self._fresh.clear()

    def sweep(self) -> None:
        """Devices delete by themselves what nobody names any more."""


Store = ClientStore | Elsewhere
"""Where a run's index of client states is."""

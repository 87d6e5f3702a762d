"""Files under names in a folder or a bucket: what artifacts, jobs and checkpoints are kept in (obstore underneath)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import obstore
from obstore.store import LocalStore

from shared.errors import GiveUpError


class Objects:
    """Every name is relative, with ``/``; a file that is there is whole."""

    def __init__(self, root: Path) -> None:
        self._store = LocalStore(root.absolute(), mkdir=True)

    def write(self, name: str, data: bytes) -> None:
        obstore.put(self._store, name, data)

    def read(self, name: str) -> bytes:
        """Raises GiveUpError where there is no such file."""
        try:
            return bytes(obstore.get(self._store, name).bytes())
        except FileNotFoundError as error:
            raise GiveUpError(f"{name} is not stored") from error

    def upload(self, name: str, path: Path) -> None:
        obstore.put(self._store, name, path)

    def download(self, name: str, path: Path) -> None:
        """Raises GiveUpError where there is no such file."""
        try:
            found = obstore.get(self._store, name)
        except FileNotFoundError as error:
            raise GiveUpError(f"{name} is not stored") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for chunk in found:
                file.write(chunk)

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names that begin with the folder ``prefix``, sorted."""
        yield from sorted(item["path"] for page in obstore.list(self._store, prefix) for item in page)

    def remove(self, prefix: str) -> None:
        """All files of a folder, or one file. What is not there is no error."""
        obstore.delete(self._store, list(self.names(prefix)))

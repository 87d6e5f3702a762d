"""What an agent put down before and after it published: on disk, appended only, so that it outlives the agent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tests.faults.oracle import Key, Sent


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Ledger:
    """One agent's file: a line for each event before it is offered, and one where all so far are acknowledged."""

    def __init__(self, directory: Path, agent_id: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.agent_id = agent_id
        self.offered = 0
        self._file = (directory / agent_id).open("a")
        self._write("\nbegan\n")  # after a line that a kill may have cut off

    def offer(self, events: Iterable[tuple[str, bytes]], *, bad: bool = False) -> None:
        """(event id, bytes) of what will be sent. On disk when this returns."""
        lines = [f"{'bad' if bad else 'good'} {event_id} {sha256(data)}\n" for event_id, data in events]
        self.offered += len(lines)
        self._write("".join(lines))

    def acknowledge(self) -> None:
        """All that this process offered up to now is acknowledged."""
        self._write("acknowledged\n")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def entries(directory: Path) -> list[Sent]:
    """What all ledgers of a directory say. A line that a kill cut off was never followed by its events."""
    return [sent for path in sorted(directory.glob("*")) for sent in _entries_of(path)]


def _entries_of(path: Path) -> list[Sent]:
    found: list[Sent] = []
    begun = 0
    for line in path.read_text().splitlines(keepends=True):
        match line.split():
            case ["began"]:
                begun = len(found)
            case ["acknowledged"]:
                found[begun:] = [replace(sent, acknowledged=True) for sent in found[begun:]]
                begun = len(found)
            case [kind, event_id, digest] if line.endswith("\n"):
                found.append(Sent(Key(path.name, event_id), digest, bad=kind == "bad"))
    return found

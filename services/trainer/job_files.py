"""A job as files: ``job.json`` and its episodes in chunks, so that whoever trains it needs neither database nor broker.

``<home>/episodes-00000.jsonl.zst`` and on have one episode a line; a chunk holds about ``CHUNK_BYTES``, so that no more
of a batch is in memory where it is written. ``<home>/job.json`` comes last: a job that has it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zstandard

from services.trainer.domain import CallRecord, Method
from services.trainer.training import Episode, Job, Recipe
from shared.errors import RetryLaterError
from shared.objects import Objects

CHUNK_BYTES = 4 * 2**20
HEAD = "job.json"
BESIDE = ("messages", "tools")  # of a call: they are written once an episode, and numbers stand for them


@dataclass(frozen=True)
class Head:
    """All of a job but its episodes. Its parent is named by what is in it, wherever that lies."""

    batch_id: str
    policy: str
    version: str
    parent_version: str
    method: Method
    parent_sha256: str
    recipe: Recipe
    sabotage: bool = False

    def job(self, parent: Path, episodes: tuple[Episode, ...], base: Path | None = None) -> Job:
        """What an engine trains, with its parent in a directory of this machine."""
        return Job(
            self.batch_id,
            self.policy,
            self.version,
            self.parent_version,
            self.method,
            parent,
            episodes,
            self.recipe,
            self.sabotage,
            base,
        )


# to bytes and back ----------------------------------------------------------------------------------
def head_bytes(head: Head, episodes: int) -> bytes:
    return json.dumps({"schema": 1, "episodes": episodes, **asdict(head)}, indent=1).encode()


def head_of(data: bytes) -> tuple[Head, int]:
    """A job's head and how many episodes it has."""
    told: dict[str, Any] = json.loads(data)
    del told["schema"]
    episodes: int = told.pop("episodes")
    return Head(**{**told, "recipe": Recipe(**told["recipe"])}), episodes


def episode_bytes(episode: Episode) -> bytes:
    """One line. A call mostly repeats the messages of the one before, so that each is written once.

    Whatever JSON brought in goes out again, NaN and half surrogate pairs too. Raises ValueError for an integer with
    more digits than Python writes.
    """
    messages, tools = _Once(), _Once()
    calls = []
    for call in episode.calls:
        told = dict(vars(call))
        told["messages"] = [messages.number(message) for message in call.messages]
        told["tools"] = None if call.tools is None else tools.number(call.tools)
        calls.append(told)
    of_run = {name: value for name, value in vars(episode).items() if name != "calls"}
    return json.dumps({**of_run, "messages": messages.all, "tools": tools.all, "calls": calls}).encode()


def episode_of(line: bytes) -> Episode:
    told: dict[str, Any] = json.loads(line)
    messages, tools = told.pop("messages"), told.pop("tools")
    calls = tuple(
        CallRecord(
            **{
                **call,
                "messages": [messages[number] for number in call["messages"]],
                "tools": None if call["tools"] is None else tools[call["tools"]],
            }
        )
        for call in told.pop("calls")
    )
    return Episode(**told, calls=calls)


class _Once:
    """Values by number, each kept once; the same is what JSON writes alike, to the order of its keys."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._numbers: dict[str, int] = {}
        self._seen: dict[int, int] = {}  # by identity: calls that extend one another share their messages

    def number(self, value: Any) -> int:
        if id(value) not in self._seen:
            text = json.dumps(value)
            if text not in self._numbers:
                self._numbers[text] = len(self.all)
                self.all.append(value)
            self._seen[id(value)] = self._numbers[text]
        return self._seen[id(value)]


# files ------------------------------------------------------------------------------------------
class JobWriter:
    """Writes a job below ``home``: its episodes one by one, and its head at the end."""

    def __init__(self, objects: Objects, home: str) -> None:
        self._objects, self._home = objects, home
        self._lines: list[bytes] = []
        self._size_bytes = 0
        self._chunks = 0
        self.episodes = 0

    def add(self, episode: Episode) -> None:
        """Raises ValueError for one that cannot be written; those before and after it can."""
        self._lines.append(episode_bytes(episode))
        self._size_bytes += len(self._lines[-1])
        self.episodes += 1
        if self._size_bytes >= CHUNK_BYTES:
            self._flush()

    def close(self, head: Head) -> None:
        self._flush()
        self._objects.write(f"{self._home}/{HEAD}", head_bytes(head, self.episodes))

    def _flush(self) -> None:
        if self._lines:
            data = zstandard.ZstdCompressor(level=1).compress(b"\n".join(self._lines))
            self._objects.write(f"{self._home}/episodes-{self._chunks:05}.jsonl.zst", data)
            self._chunks += 1
            self._lines, self._size_bytes = [], 0


def read_job(objects: Objects, home: str, parent: Path, base: Path | None = None) -> Job:
    """The job below ``home``. Raises GiveUpError where there is none, RetryLaterError where episodes are missing."""
    head, expected = head_of(objects.read(f"{home}/{HEAD}"))
    episodes = tuple(_episodes(objects, home))
    if len(episodes) != expected:
        raise RetryLaterError(f"{home} has {len(episodes)} of {expected} episodes; a retry writes it anew")
    return head.job(parent, episodes, base)


def _episodes(objects: Objects, home: str) -> Iterator[Episode]:
    for name in objects.names(home):
        if name.endswith(".jsonl.zst"):
            yield from map(episode_of, zstandard.ZstdDecompressor().decompress(objects.read(name)).split(b"\n"))

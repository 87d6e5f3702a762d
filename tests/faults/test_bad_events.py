"""What no agent should send, each among good neighbours: dead alone, with a reason, and nobody else with it."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from uuid import UUID

from ratchet_sdk.events import MAX_EVENT_BYTES, Step, uuid7
from ratchet_sdk.values import encoded

from tests.faults.agent import Wire
from tests.faults.site import Site

RUN = str(uuid7())
BOMB_BYTES = 256 * 1024 * 1024


def step(number: int, **more: object) -> Step:
    now = datetime.now(UTC)
    return Step.model_validate({"trajectory_id": RUN, "started_at": now, "occurred_at": now, "step": number, **more})


def template() -> bytes:
    """A step that nothing is wrong with, of a run of its own, so that only what is done to it can be."""
    return encoded(step(0, trajectory_id="t"))


def with_(old: str, new: str) -> bytes:
    data = template()
    assert old.encode() in data
    return data.replace(old.encode(), new.encode(), 1)


def field(name: str, value: str) -> bytes:
    """The step with a field whose value is this JSON."""
    return template()[:-1] + f',"{name}":{value}}}'.encode()


def bomb() -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    megabyte = bytes(1024 * 1024)
    return b"".join(packer.compress(megabyte) for _ in range(BOMB_BYTES // len(megabyte))) + packer.flush()


def sized(number: int, size_bytes: int) -> Step:
    """A step whose JSON has exactly so many bytes."""
    bare = step(number, environment={"text": ""})
    return bare.model_copy(update={"environment": {"text": "x" * (size_bytes - len(encoded(bare)))}})


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def bad() -> dict[str, bytes]:
    id_of_year_10889 = UUID(int=0xFFFFFFFFFFFF << 80 | 7 << 76 | 2 << 62)
    return {
        "nothing": b"",
        "no JSON": b"{",
        "cut off": template()[:-1],
        "two objects": template() + template(),
        "a list": b"[" + template() + b"]",
        "not UTF-8": template().replace(b'"t"', b'"\xff\xfe"'),
        "a NUL byte": template().replace(b'"t"', b'"t\x00"'),
        "a NUL in an id": with_('"t"', '"t\\u0000"'),
        "half a surrogate": field("note", '"\\ud800"'),
        "the other half": field("note", '"\\udc00 \\ud800"'),
        "a surrogate in UTF-8": template()[:-1] + b',"note":"\xed\xa0\x80"}',
        "a step in words": with_('"step":0', '"step":"zero"'),
        "a step below zero": with_('"step":0', '"step":-1'),
        "a step beyond its column": with_('"step":0', '"step":2147483648'),
        "a step of 5,000 digits": with_('"step":0', f'"step":{"9" * 5000}'),
        "an id that is a number": with_('"t"', "7"),
        "a list for an object": field("environment", "[1]"),
        "an object for a list": field("llm_calls", "{}"),
        "a reward that is no number": field("reward", "NaN"),
        "a reward without end": field("reward", "1e999"),
        "no kind": with_('"kind"', '"sort"'),
        "another kind": with_('"kind":"step"', '"kind":"hop"'),
        "schema 2": with_('"schema":1', '"schema":2'),
        "schema 0": with_('"schema":1', '"schema":0'),
        "schema null": with_('"schema":1', '"schema":null'),
        "schema in words": with_('"schema":1', '"schema":"one"'),
        "no id": with_('"event_id"', '"other_id"'),
        "an id of version 4": field("event_id", '"00000000-0000-4000-8000-000000000000"'),
        "an id of the year 10889": field("event_id", f'"{id_of_year_10889}"'),
        "a time without a zone": field("started_at", '"2026-11-20T10:00:00"'),
        "a time in words": field("started_at", '"yesterday"'),
        "the year 0": field("started_at", '"0000-01-01T00:00:00Z"'),
        "before the year 1": field("started_at", '"0001-01-01T00:00:00+05:00"'),
        "deep and cut off": b'{"a":' * 100_000,
        "deep and whole": field("environment", nested(100_000)),
        "just over the limit": encoded(sized(0, MAX_EVENT_BYTES + 1)),
    }


def bad_packed() -> dict[str, tuple[bytes, str]]:
    """What is wrong with its ``Content-Encoding``."""
    return {
        "a bomb": (bomb(), "gzip"),
        "just over when unpacked": (gzip.compress(encoded(sized(0, MAX_EVENT_BYTES + 1)), 1), "gzip"),
        "not packed at all": (template(), "gzip"),
        "packed and cut off": (gzip.compress(template())[:-9], "gzip"),
        "packed and damaged": (gzip.compress(template())[:-8] + bytes(8), "gzip"),
        "something behind it": (gzip.compress(template()) + b"more", "gzip"),
        "twice packed": (gzip.compress(gzip.compress(template())), "gzip"),
        "another encoding": (zlib.compress(template()), "deflate"),
    }


def odd() -> list[bytes]:
    """Lawful, however it looks: kept byte for byte."""
    return [
        encoded(step(1000, started_at=datetime(1970, 1, 1, tzinfo=UTC), trajectory_id="of-1970")),
        encoded(step(1011, started_at=datetime(1, 1, 1, tzinfo=UTC), trajectory_id="of-1")),
        encoded(step(1001, started_at=datetime(2099, 1, 1, tzinfo=UTC), trajectory_id="of-2099")),
        encoded(step(1002, event_id=UUID(int=1 << 80 | 7 << 76 | 2 << 62))),
        encoded(step(1003, event_id=UUID(int=4_070_908_800_000 << 80 | 7 << 76 | 2 << 62))),
        encoded(step(1004, environment={"\x00": "\x00 \ufffe \U0001f600"}, action={"type": "\u202e"})),
        encoded(step(1005)).replace(b'"step":1005', b'"step":1005,"step" : 1005,"unknown":[1,{"kept":1.0e2}]'),
        b" \n" + encoded(step(1006)) + b"\n",
        encoded(step(1007)).replace(b'"environment":{}', f'"environment":{nested(100)}'.encode()),
        encoded(step(1008)).replace(b'"environment":{}', b'"environment":{"text":"\\u00e4\\ud83d\\ude00"}'),
        encoded(sized(1009, 256 * 1024)),
        encoded(sized(1010, MAX_EVENT_BYTES)),
    ]


async def test_each_bad_event_is_dead_alone(place: Site, told: Callable[..., None]) -> None:
    wire = Wire(place.bus, "a", place.home)
    letters: list[tuple[bytes, dict[str, str]]] = [(data, {}) for data in bad().values()]
    letters += [(data, {"Content_Encoding": encoding}) for data, encoding in bad_packed().values()]
    lawful = odd()
    await publish_mixed(wire, letters, lawful, place.rng)
    await Wire(place.bus, "a.b", place.home).publish(template(), bad=True)
    recorder = await place.recorder()
    counts = await place.settle()
    peak_mb = int(next(line.split()[1] for line in status_of(recorder.process.pid) if line.startswith("VmHWM"))) // 1024
    told(bad=len(letters) + 1, odd=len(lawful), recorder_peak_mb=peak_mb, **counts)
    assert counts["dead"] == len(letters) + 1
    assert peak_mb < BOMB_BYTES // 1024**2, "the bomb was unpacked"
    assert counts["stored"] == counts["acknowledged"]
    # What another event has taken is bad only because that one came before.
    first, again = step(5000), step(5000)
    await wire.good(first)
    await place.drained()
    other = first.model_copy(update={"environment": {"changed": True}})
    await wire.publish(encoded(again), bad=True)
    await wire.publish(encoded(other), bad=True)
    told(conflicts=2, **await place.settle())


async def publish_mixed(
    wire: Wire, letters: list[tuple[bytes, dict[str, str]]], lawful: list[bytes], rng: Random
) -> None:
    """Each bad one between two good ones, the odd ones among them, plain and packed, in an order of the seed's."""
    todo: list[Callable[[], object]] = []
    for data, headers in letters:
        todo.append(lambda data=data, headers=headers: wire.publish(data, bad=True, **headers))
    for data in lawful:
        event_id = Step.model_validate_json(data).event_id
        todo.append(lambda data=data, event_id=event_id: wire.publish(data, event_id=event_id))
    rng.shuffle(todo)
    for number, publish in enumerate(todo):
        await wire.good(step(number))
        await publish()
    await wire.good(step(len(todo)))


def status_of(pid: int) -> list[str]:
    with open(f"/proc/{pid}/status") as file:
        return file.readlines()

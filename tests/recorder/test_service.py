"""A batch of messages: what becomes a row, what a dead letter, and what is nobody's fault."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from ratchet_sdk.events import MAX_EVENT_BYTES

from services.recorder.domain import Received
from services.recorder.service import TOGETHER_BYTES, Kept, Recording
from services.recorder.settings import RecorderSettings
from services.recorder.store import EventStore
from shared.bodies import unpacked
from shared.database import Pool
from shared.delivery import Ack, Dead
from shared.errors import RetryLaterError
from tests.recorder.events import WINDOW_S, call_made, delivery, encoded, ended, reply, started, step


def settings(**more: Any) -> RecorderSettings:
    return RecorderSettings(**{"window_s": WINDOW_S, "grace_s": 0, "trajectory_limit_s": 5, **more})


def recording(pool: Pool, **more: Any) -> Recording:
    return Recording(EventStore(pool), settings(**more))


STEP = step(0)
GOOD = encoded(STEP)
HOSTILE = {
    "not JSON": b"{",
    "nothing": b"",
    "no object": b"[]",
    "half a surrogate": GOOD.replace(b'"t"', b'"\\ud800"'),
    "not UTF-8": GOOD.replace(b'"t"', b'"\xff"'),
    "another schema": GOOD.replace(b'"schema":1', b'"schema":2'),
    "another kind": GOOD.replace(b'"kind":"step"', b'"kind":"hop"'),
    "an id that is no UUIDv7": GOOD.replace(str(STEP.event_id).encode(), b"00000000-0000-4000-8000-000000000000"),
    "no id": GOOD.replace(b'"event_id"', b'"other_id"'),
    "a NUL in an id": GOOD.replace(b'"t"', b'"t\\u0000"'),
    "no zone": GOOD.replace(b"Z", b""),
    "a step beyond int4": GOOD.replace(b'"step":0', b'"step":2147483648'),
    "a reward that is no number": GOOD.replace(b'"step":0', b'"step":0,"reward":NaN'),
    "an expectation of nothing known": encoded(started()).replace(b'"expects":[]', b'"expects":["luck"]'),
    "too many expectations": encoded(started()).replace(
        b'"expects":[]', b'"expects":["reward"' + b',"reward"' * 32 + b"]"
    ),
    "deep": b'{"a":' * 100_000,
}


async def test_bad_events_are_dead_and_their_neighbours_pass(pool: Pool) -> None:
    deliveries = [delivery(data, 2 * place + 2) for place, data in enumerate(HOSTILE.values())]
    good = [delivery(encoded(step(n)), 2 * n + 1) for n in range(len(HOSTILE) + 1)]
    mixed = sorted([*good, *deliveries], key=lambda d: d.sequence)
    verdicts = await recording(pool, window_s=7 * 86_400).take_in(mixed)
    dead = {d.sequence: v for d, v in zip(mixed, verdicts, strict=True) if isinstance(v, Dead)}
    assert sorted(dead) == [d.sequence for d in deliveries]
    assert await pool.fetchval("select count(*) from steps") == len(good)
    for verdict in dead.values():
        assert verdict.reason.isprintable()


class Watched(EventStore):
    """Notes how many bytes of JSON were handed over together."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.together: list[int] = []

    async def keep(self, events: Sequence[Received], window_s: int) -> Kept:
        self.together.append(sum(event.size_bytes for event in events))
        return await super().keep(events, window_s)


async def test_what_gzip_makes_small_is_held_a_part_at_a_time(pool: Pool) -> None:
    large = [gzip.compress(encoded(step(n, environment={"x": "y" * 700_000}))) for n in range(20)]
    mixed = [delivery(data, 2 * n + 1, Content_Encoding="gzip") for n, data in enumerate(large)]
    bad = [delivery(b"{", 2 * n) for n in range(1, 20)]
    store = Watched(pool)
    deliveries = sorted([*mixed, *bad], key=lambda d: d.sequence)
    verdicts = await Recording(store, settings()).take_in(deliveries)
    assert [isinstance(v, Dead) for v in verdicts] == [d in bad for d in deliveries]
    assert await pool.fetchval("select count(*) from steps") == len(large)
    assert len(store.together) > 1
    assert max(store.together) < TOGETHER_BYTES + 800_000


async def test_encodings_sizes_and_subjects_are_checked(pool: Pool) -> None:
    large = encoded(step(1, environment={"x": "y" * MAX_EVENT_BYTES}))
    mixed = [
        delivery(gzip.compress(GOOD), 1, Content_Encoding="gzip"),
        delivery(GOOD, 2, Content_Encoding="br"),
        delivery(GOOD, 3, Content_Encoding="gzip"),
        delivery(large, 4),
        delivery(gzip.compress(large), 5, Content_Encoding="gzip"),
        delivery(GOOD, 6, "steps.a.b"),
    ]
    verdicts = await recording(pool).take_in(mixed)
    assert [type(v) for v in verdicts] == [Ack, Dead, Dead, Dead, Dead, Dead]
    body = await pool.fetchrow("select sha256, size_bytes from bodies")
    assert body is not None
    assert (body["sha256"], body["size_bytes"]) == (hashlib.sha256(GOOD).digest(), len(GOOD))


async def test_on_the_subject_of_witnesses_only_calls_are_taken(pool: Pool) -> None:
    call = encoded(call_made("c", response=reply()))
    sent = [*(encoded(event) for event in (started(), step(0), ended())), call]
    verdicts = await recording(pool).take_in([delivery(data, n + 1, "calls.a") for n, data in enumerate(sent)])
    assert [v.reason.partition(";")[2] for v in verdicts if isinstance(v, Dead)] == [" publish it on steps.a"] * 3
    assert verdicts[3] == Ack()
    [body] = await pool.fetch("select kind, witnessed from bodies")
    assert tuple(body) == ("llm_call", True)


async def test_an_odd_but_lawful_event_is_stored(pool: Pool) -> None:
    ancient = UUID("00000000-0001-7000-8000-000000000000")
    odd = [
        encoded(step(0, environment={"\u0000": "\u0000", "n": 1e308}, action={"type": "😀", "error": "\u0000"})),
        encoded(started(goal="\u0000", metadata={"a": {"b": ["\u0000"]}})),
        encoded(step(1).model_copy(update={"event_id": ancient})),
        encoded(call_made("c", response=reply("\u0000"), usage={"prompt_tokens": 10**30, "completion_tokens": "x"})),
        encoded(ended(started_at=datetime(1970, 1, 1, tzinfo=UTC))),
        encoded(step(2, started_at=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), trajectory_id="future")),
        encoded(step(3)).replace(b'"step":3', b'"step":3,"unknown":{"kept":[1,2]}'),
    ]
    verdicts = await recording(pool).take_in([delivery(data, n + 1) for n, data in enumerate(odd)])
    assert verdicts == [Ack()] * len(odd)
    stored = {unpacked(row["body"]) for row in await pool.fetch("select body from bodies")}
    assert stored == set(odd)
    assert await pool.fetchval("select clock_skewed from trajectories where trajectory_id = 'future'") is True


async def test_a_value_that_only_the_database_refuses_is_dead_alone(pool: Pool) -> None:
    await pool.execute("alter table steps add check (action_type <> 'poison')")
    batch = [delivery(encoded(step(n, action={"type": "poison" if n in (3, 17) else "buy"})), n + 1) for n in range(20)]
    verdicts = await recording(pool).take_in(batch)
    assert [n for n, verdict in enumerate(verdicts) if isinstance(verdict, Dead)] == [3, 17]
    assert await pool.fetchval("select count(*) from steps") == 18


class Away:
    async def keep(self, events: Sequence[Received], window_s: int) -> Kept:
        raise RetryLaterError("Postgres is away")


async def test_an_absent_database_is_nobodys_fault() -> None:
    service = Recording(Away(), settings())  # type: ignore[arg-type]  # only keep is reached
    with pytest.raises(RetryLaterError):
        await service.take_in([delivery(GOOD, 1)])

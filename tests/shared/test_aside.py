"""One row that cannot be handled stops only itself, and says why."""

from __future__ import annotations

import asyncpg
import pytest
from prometheus_client import REGISTRY

from shared import aside
from shared.aside import Aside
from shared.database import Pool, Record
from shared.errors import RetryLaterError

ROWS = ["a", "bad", "c"]


class Work:
    """Handles rows, and raises what it is told to for one of them."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.done: list[str] = []

    async def __call__(self, row: str) -> str:
        if row == "bad" and self.error is not None:
            raise self.error
        self.done.append(row)
        return row.upper()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def notes(pool: Pool) -> list[Record]:
    return await pool.fetch("select service, kind, key, reason, count from set_aside")


async def test_one_row_is_set_aside_with_its_reason_and_the_rest_goes_on(pool: Pool) -> None:
    clock, work = Clock(), Work(KeyError("no such\x00 \udc00 place"))
    one = Aside("recorder", pool, clock)
    before = REGISTRY.get_sample_value("ratchet_set_aside_total", {"kind": "close"}) or 0
    assert await one.each("close", ROWS, str, work) == ["A", "C"]
    [note] = await notes(pool)
    assert tuple(note) == ("recorder", "close", "bad", r"KeyError: 'no such\x00 \udc00 place'", 1)
    assert REGISTRY.get_sample_value("ratchet_set_aside_total", {"kind": "close"}) == before + 1

    work.done.clear()
    assert one.resting("close") == ["bad"]
    assert one.resting("announce") == []
    assert await one.each("close", ROWS, str, work) == ["A", "C"]
    assert (await notes(pool))[0]["count"] == 1, "it rests"
    clock.now = 1
    assert one.resting("close") == []
    await one.each("close", ROWS, str, work)
    assert (await notes(pool))[0]["count"] == 2
    clock.now = 2.9
    assert one.resting("close") == ["bad"], "each time twice as long"
    clock.now = 3
    work.error = None
    assert await one.each("close", ROWS, str, work) == ["A", "C", "BAD"]
    assert await notes(pool) == []


@pytest.mark.parametrize(
    "error", [RetryLaterError("NATS is away"), OSError(), asyncpg.InterfaceError("pool is closing")]
)
async def test_a_server_that_is_away_is_no_rows_fault_and_the_row_that_met_it_comes_last(
    pool: Pool, error: Exception
) -> None:
    one, work = Aside("recorder", pool), Work(error)
    with pytest.raises(type(error)):
        await one.each("close", ROWS, str, work)
    assert work.done == ["a"]
    with pytest.raises(type(error)):
        await one.each("close", ROWS, str, work)
    assert work.done == ["a", "a", "c"]
    assert await notes(pool) == []


async def test_a_value_that_the_driver_cannot_write_is_its_rows_fault(pool: Pool) -> None:
    async def write(row: str) -> str:
        await pool.execute("select $1::int", row if row == "bad" else 1)
        return row

    assert await Aside("recorder", pool).each("close", ROWS, str, write) == ["a", "c"]
    [note] = await notes(pool)
    assert note["reason"].startswith("DataError: invalid input for query argument")


async def test_what_nobody_renews_is_over_and_what_cannot_be_noted_stops_nothing(pool: Pool) -> None:
    await aside.note(pool, "recorder", "close", "old", "once")
    await aside.note(pool, "scorer", "close", "old", "another's")
    await pool.execute("update set_aside set last_at = now() - interval '2 hours'")
    await aside.note(pool, "recorder", "close", "new", "now")
    assert {(note["service"], note["key"]) for note in await notes(pool)} == {("recorder", "new"), ("scorer", "old")}
    await pool.execute("drop table set_aside")
    assert await Aside("recorder", pool).each("close", ROWS, str, Work(ValueError())) == ["A", "C"]
    assert await Aside("recorder").each("close", ROWS, str, Work(ValueError())) == ["A", "C"]

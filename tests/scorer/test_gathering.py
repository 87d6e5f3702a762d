"""What is wanted at the same time is done together, and each caller gets what is its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg

from services.scorer.ruler.gathering import Gathered
from services.scorer.ruler.ledger_store import LedgerStore, Reply
from shared.database import Pool

REPLY = Reply("words", 11, 7, None, 1.0)


class Halves:
    """Half of each even number; an odd one is refused, and 0 is a server that is away."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    async def __call__(self, numbers: list[int]) -> Sequence[int]:
        self.asked.append(numbers)
        if 0 in numbers:
            raise ConnectionError("away")
        if odd := [n for n in numbers if n % 2]:
            raise ValueError(f"{odd} are odd")
        return [n // 2 for n in numbers]


async def test_each_gets_its_own_result_of_one_call() -> None:
    halves = Halves()
    half = Gathered(halves, 0.001)
    assert await asyncio.gather(half(6), half(2), half(4)) == [3, 1, 2]
    assert halves.asked == [[6, 2, 4]]
    assert await half(8) == 4


async def test_what_is_refused_fails_alone() -> None:
    half = Gathered(Halves(), 0.001)
    one, refused, other = await asyncio.gather(half(6), half(3), half(4), return_exceptions=True)
    assert (one, other) == (3, 2)
    assert str(refused) == "[3] are odd"


async def test_a_lost_server_is_told_to_all_and_tried_once() -> None:
    halves = Halves()
    half = Gathered(halves, 0.001)
    results = await asyncio.gather(half(6), half(0), return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionError, ConnectionError]
    assert len(halves.asked) == 1


async def test_a_caller_that_has_gone_keeps_nobody_from_its_result() -> None:
    half = Gathered(Halves(), 0.001)
    gone, stays = asyncio.create_task(half(2)), asyncio.create_task(half(4))
    await asyncio.sleep(0)
    gone.cancel()
    assert await stays == 2


async def test_of_two_that_ask_the_same_together_one_asks(pool: Pool) -> None:
    ledger, other = LedgerStore(pool, lease_s=60), LedgerStore(pool, lease_s=60)
    claims = await asyncio.gather(ledger.claim(b"q"), ledger.claim(b"q"), ledger.claim(b"r"))
    assert claims == [True, False, True]
    assert await asyncio.gather(other.claim(b"r"), other.claim(b"s"), other.claim(b"q")) == [False, True, False]


async def test_replies_that_are_kept_together_are_each_about_their_runs(pool: Pool) -> None:
    ledger = LedgerStore(pool, lease_s=60)
    runs = {b"q": [("a", "r1"), ("b", "r1")], b"r": [("a", "r2")]}
    assert all(await asyncio.gather(*(ledger.claim(sha256) for sha256 in runs)))
    too_many = Reply("words", 2**40, 7, None, 1.0)  # more tokens than a column holds
    results = await asyncio.gather(
        *(ledger.keep(sha256, "ruler", "m", REPLY, about) for sha256, about in runs.items()),
        ledger.keep(b"s", "ruler", "m", too_many, [("a", "r3")]),
        return_exceptions=True,
    )
    assert results[:2] == [None, None]
    assert isinstance(results[2], asyncpg.DataError)
    assert await asyncio.gather(*(ledger.remembered(q, []) for q in (b"r", b"q", b"s"))) == [REPLY, REPLY, None]
    rows = await pool.fetch("select content_sha256, agent_id, trajectory_id from judge_cache_runs")
    assert {tuple(row) for row in rows} == {(sha256, *key) for sha256, about in runs.items() for key in about}
    assert await pool.fetchval("select count(*) from judge_claims") == 0

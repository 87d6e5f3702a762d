"""`ratchet outcomes`: what is known of windows, one in full, and past ones filled by the real tracker."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from services.outcome_tracker.source_csv import CsvSource
from shared.bus import Bus
from shared.database import Pool
from tests.cli.conftest import Ratchet
from tests.outcome_tracker.world import (
    ENDS,
    WINDOW,
    Tracker,
    about,
    add_run,
    add_window,
    closed,
    delivery,
    metric,
    price,
    resolution,
    reward,
    settled,
    tracker,
)

pytestmark = pytest.mark.usefixtures("servers")
NEXT = "2026-11-20T11:00"


@pytest.fixture
async def known(pool: Pool, bus: Bus) -> Tracker:
    """A window that was settled, one that waits, one of which nothing is known."""
    await add_window(pool)
    for agent in ("a", "b"):
        await add_run(pool, agent, expects=["reward", "price:IRON"])
    await add_window(pool, window_id=NEXT, starts_at=ENDS)
    await add_window(pool, window_id="2026-11-20T12:00", starts_at=ENDS + timedelta(hours=1))
    await pool.execute("update windows set trajectories = 2 where window_id <> '2026-11-20T12:00'")
    facts = (
        price("IRON", 0, 1, news="up\x1b[31m"),
        price("IRON", 4, 2, volume=3),
        resolution("m-1", "yes"),
        resolution("m-1", "no", 3),
        metric("index", 7),
        about("a", "reopened", 2, 5000),
    )
    made = await settled(pool, bus, *facts, settle_max_s=0)
    await made.settling.window_closed(closed(NEXT, ENDS))
    await made.facts.take_in([delivery(reward("a", 1), 9)])
    return made


@pytest.mark.usefixtures("known")
async def test_windows_are_listed_with_what_is_missing_and_what_does_not_agree(ratchet: Ratchet) -> None:
    rows = (await ratchet("outcomes", "--json")).json
    assert [(row["window_id"], row["state"], row["revision"], row["touched"]) for row in rows] == [
        (NEXT, "waiting", 1, False),
        (WINDOW, "settled", 1, True),
    ]
    assert rows[1]["missing"] == ["reward of 2 runs"]
    plain = await ratchet("outcomes")
    for words in (WINDOW, "settled, new facts", "reward of 2 runs", "resolution:m-1: 2 outcomes were told"):
        assert words in plain.out
    assert [row["window_id"] for row in (await ratchet("outcomes", "-n", "1", "--json")).json] == [NEXT]


@pytest.mark.usefixtures("known")
async def test_one_window_is_shown_in_full(ratchet: Ratchet) -> None:
    found = (await ratchet("outcomes", "show", WINDOW, "--json")).json
    assert found["expected"] == [{"expected": "price:IRON", "runs": 2}, {"expected": "reward", "runs": 2}]
    assert found["settlements"][0]["facts"]["prices"]["IRON"]["change"] is None
    assert found["about_runs"] == [
        {"name": "reopened", "facts": 1, "runs": 1, "mean": 2.0},
        {"name": "reward", "facts": 1, "runs": 1, "mean": 1.0},
    ]
    plain = await ratchet("outcomes", "show", WINDOW)
    for words in ("settled, 2 runs", "expected: price:IRON (2 runs), reward (2 runs)", "IRON", "m-1", "reopened"):
        assert words in plain.out
    assert "\x1b[31m" not in plain.out
    waiting = await ratchet("outcomes", "show", NEXT)
    assert (waiting.code, "waiting, 2 runs" in waiting.out) == (0, True)
    gone = await ratchet("outcomes", "show", "2026-11-20T23:00")
    assert (gone.code, gone.err) == (
        2,
        "ratchet: there is no window '2026-11-20T23:00'; `ratchet windows` lists them\n",
    )


@pytest.mark.usefixtures("known")
async def test_past_windows_are_filled(ratchet: Ratchet, pool: Pool, bus: Bus, tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    head = "kind,occurred_at,name,value\n"
    path.write_text(f"{head}metric,2026-11-20T10:30:00Z,index,9\nmetric,2026-11-20T11:30:00Z,index,1\n")
    filled = tracker(pool, bus, sources=[CsvSource("desk", str(path))], settle_min_s=3600)
    await filled.listen()
    said = await ratchet("outcomes", "sync", "--from", "2026-11-20", "--to", "2026-11-20T12:00", "--json")
    assert said.code == 0
    assert (said.json["windows"], said.json["waiting"], said.json["sources"]) == (2, 1, ["desk"])
    assert said.json["corrected"] == [{"window_id": WINDOW, "revision": 2, "changed": ["metric:index", "reward"]}]
    assert (said.json["facts_published"], said.json["bad_rows"], said.json["faults"]) == (2, 0, {})

    path.write_text(f"{head}metric,2026-11-20T10:40:00Z,index,2\nmetric,2026-11-20T10:30:00Z,index,NaN\n")
    plain = await ratchet("outcomes", "sync", "--from", "2026-11-20T10:00:00+00:00", "--to", "2026-11-20T12:00")
    assert plain.code == 1, "something was found wrong"
    assert f"{WINDOW}: revision 3: metric:index" in plain.out
    assert f"{WINDOW}: missing reward of 1 run" in plain.out
    assert "2/2" in plain.err
    assert "facts.csv line 3: not an outcome: metric.metric.value: Input should be a finite number" in plain.err
    nothing = await ratchet("outcomes", "sync", "--from", "2025-01-01", "--to", "2025-01-02", "--json")
    assert (nothing.code, nothing.json["windows"], nothing.json["facts_read"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--from", "yesterday"), 2, "--from 'yesterday' is no time; write 2026-11-20"),
        (("--from", "2026-11-20", "--to", "2026-11-20"), 2, "--from 2026-11-20 is not before --to 2026-11-20"),
        (("--from", "2999-01-01"), 2, "--from 2999-01-01 is not before --to now"),
        ((), 2, "Missing option '--from'"),
        (("--from", "2026-11-20", "--to", "2026-11-21"), 75, "no outcome_tracker is running"),
    ],
)
@pytest.mark.usefixtures("bus")
async def test_a_wrong_sync_is_one_line(ratchet: Ratchet, arguments: tuple[str, ...], code: int, words: str) -> None:
    said = await ratchet("outcomes", "sync", *arguments)
    assert (said.code, len(said.err.splitlines())) == (code, 1)
    assert words in said.err

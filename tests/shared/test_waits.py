"""The view ``waits``: whatever has not ended is in it, with what it waits for and an end that is never unknown."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from services.admin.domain import WAITS
from services.admin.store import Store
from services.cli.loop_checks import MOVED_BY
from shared.database import Pool
from shared.waits import limits_of
from tests.admin import world

W = world.WINDOW
CLEAR = """update windows set announced_at = now(); update settlements set announced_at = now();
           update groups set announced_at = now() where judged_at is not null;
           update deployments set announced_at = now() where decided_at is not null;
           update models set announced_at = now(); update batches set state = 'trained';
           update deployments set state = 'superseded' where state = 'canary'"""

# What leaves something undone, in a world that has nothing to do, and how its wait is named.
UNDONE = {
    "insert into windows (window_id, starts_at, ends_at, length_s) values ('w', now(), now() + interval '1 h', 3600)": (
        "window",
        "window w",
        "its end and the grace after it",
    ),
    f"""update windows set state = 'open', ends_at = now() - interval '10 min', starts_at = now() - interval '70 min';
        update trajectories set status = 'open', started_at = now() - interval '11 min' where window_id = '{W}'""": (
        "window",
        f"window {W}",
        "runs that have not ended",
    ),
    "update windows set state = 'open'": ("window", f"window {W}", "the recorder to read its barrier"),
    "update windows set state = 'open', barrier_sequence = 7": (
        "window",
        f"window {W}",
        "the recorder to store what lies before its barrier",
    ),
    "update windows set announced_at = null": ("window", f"window {W}", "the broker to take its announcement"),
    "delete from settlements": ("settlement", f"window {W}", "the outcome tracker to take it up"),
    "update settlements set state = 'waiting', announced_at = null": (
        "settlement",
        f"window {W}",
        "outcomes to come in, and pull sources to be read",
    ),
    "update settlements set state = 'waiting', announced_at = null, barrier_sequence = 7": (
        "settlement",
        f"window {W}",
        "what its runs expect, and the outcomes before its barrier",
    ),
    "update settlements set announced_at = null, settled_at = now()": (
        "settlement",
        f"window {W}",
        "the broker to take its announcement",
    ),
    f"insert into corrections_due (window_id) values ('{W}')": (
        "correction",
        f"window {W}",
        "more facts about it, to be taken in together",
    ),
    """delete from batch_trajectories; delete from judgments; delete from group_members; delete from groups;
       update windows set trajectories = 2""": ("judgment", f"window {W}", "the scorer to group its runs"),
    "update groups set state = 'pending', not_before = now()": (
        "judgment",
        f"default in window {W}: 2 groups",
        "a judge that is free",
    ),
    "update groups set wanted_revision = revision + 1, not_before = now() + interval '1 min'": (
        "judgment",
        f"default in window {W}: 2 groups",
        "the judge that holds it",
    ),
    "update groups set state = 'failed', failure = 'it timed out', attempts = 2": (
        "judgment",
        f"default in window {W}: 2 groups",
        "another try of the judge",
    ),
    "update groups set state = 'pending', waits_for = 'budget'": (
        "judgment",
        f"default in window {W}: 2 groups",
        "the judge's budget of the next UTC day",
    ),
    "update groups set announced_at = null, judged_at = now()": (
        "announcement",
        f"default in window {W}: 2 groups",
        "the broker to take its announcement",
    ),
    """update groups set announced_at = null, judged_at = now();
       insert into looks (group_id, revision, look, hindsight, judge, model, rubric, content_sha256, latency_ms,
                          remembered)
       select group_id, revision, 0, true, 'ruler', 'm', 'r', '', 1, false from groups""": (
        "announcement",
        f"default in window {W}: 2 groups",
        "its judge to pass a probe, or an operator's release",
    ),
    """insert into judge_probes (judge, model, rubric, endpoint, suite, asked_by, pass_mark, cases)
       values ('ruler', 'm', 'r', 'e', 's', 'schedule', 0.9, 10)""": (
        "probe",
        "the judge m",
        "the planted cases to be judged",
    ),
    "update batches set state = 'claimed', lease_until = now() + interval '1 min'": (
        "batch",
        "%s of default",
        "the trainer that holds it",
    ),
    "update batches set state = 'claimed', lease_until = now()": ("batch", "%s of default", "a trainer that is free"),
    "update deployments set state = 'canary', deadline_at = null where version = 'v1'": (
        "trial",
        "default v1",
        "evidence of v1 against v0",
    ),
    "update deployments set state = 'verifying', deadline_at = null where version = 'v1'": (
        "trial",
        "default v1",
        "an endpoint that answers as v1",
    ),
    "delete from deployments where version = 'v1'": ("trial", "default v1", "the deployer to take it up"),
    "delete from deployments where version = 'v1'; update models set announced_at = null where version = 'v1'": (
        "trial",
        "default v1",
        "the broker to take its announcement",
    ),
    "update deployments set announced_at = null, decided_at = now() where version = 'v1'": (
        "announcement",
        "default v1",
        "the broker to take its announcement",
    ),
}


@pytest.fixture
async def quiet(pool: Pool) -> Store:
    """A world in which all that was begun is done."""
    await world.build(pool)
    await pool.execute(CLEAR)
    store = Store(pool)
    assert await store.waits() == []
    return store


@pytest.mark.parametrize("undone", UNDONE)
async def test_what_is_undone_waits_for_something_and_has_an_end(pool: Pool, quiet: Store, undone: str) -> None:
    kind, what, waits_for = UNDONE[undone]
    await pool.execute(undone)
    found = await quiet.waits()
    batch = await pool.fetchval("select batch_id from batches")
    expected = (kind, what.replace("%s", batch), waits_for)
    assert expected in [(one["kind"], one["what"], one["waits_for"]) for one in found]
    assert {one["kind"] for one in found} <= {kind, *(["training"] if kind == "trial" else [])}
    for one in found:
        assert None not in one.values()
        assert one["since"] < one["until"]


@pytest.mark.parametrize(
    "ended",
    [
        "update groups set state = 'disputed'",
        "update groups set state = 'small', wanted_revision = 9",
        "update groups set state = 'failed', failure = 'it timed out', attempts = 6",
        "update deployments set state = 'held' where version = 'v1'",
        "update deployments set state = 'refused' where version = 'v1'",
        "update judge_probes set state = 'unfinished'",
        "update batches set state = 'failed'",
    ],
)
async def test_what_has_ended_waits_for_nobody(pool: Pool, quiet: Store, ended: str) -> None:
    await pool.execute(ended)
    assert await quiet.waits() == []


async def test_a_closed_gate_says_which_version_training_waits_for(pool: Pool, quiet: Store) -> None:
    await pool.execute("update deployments set state = 'canary', deadline_at = now() where version = 'v1'")
    await pool.execute(
        """insert into models (policy, version, number, parent, method, artifact_sha256, announced_at)
           select policy, 'v2', 2, 'v1', method, artifact_sha256, now() from models where version = 'v1'"""
    )
    rows = {(one["what"], one["waits_for"]): one for one in await quiet.waits()}
    assert ("default v2", "the verdict on v1") in rows
    training = rows["training of default", "the verdict on v2"]
    assert training["until"] > rows["default v1", "evidence of v1 against v0"]["until"]


async def test_the_ends_follow_what_the_services_say(pool: Pool, quiet: Store) -> None:
    await pool.execute("update settlements set state = 'waiting', wait_from = now(), announced_at = null")

    async def allowed() -> Any:
        [one] = await quiet.waits()
        return one["until"] - one["since"]

    default = await allowed()
    await limits_of(pool, "outcome_tracker", settle_s=7200).run()
    assert await allowed() - default == timedelta(hours=1)


async def test_what_is_overdue_comes_first(pool: Pool, quiet: Store) -> None:
    await pool.execute("update settlements set state = 'waiting', wait_from = now(), announced_at = null")
    await pool.execute(
        "update batches set state = 'claimed', lease_until = now() - interval '1 h', created_at = '2026-01-01'"
    )
    assert [(one["kind"], one["overdue"]) for one in await quiet.waits()] == [("batch", True), ("settlement", False)]


def test_every_kind_has_its_service() -> None:
    assert set(MOVED_BY) == set(WAITS) == {kind for kind, _, _ in UNDONE.values()} | {"training"}

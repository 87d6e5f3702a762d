"""`ratchet agents key`, `keys` and `revoke-key`, and what doctor says of keys and of calls that nothing records."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.admin.keys_store import GatewayKeys
from services.cli.gateway_checks import ending, gateway
from services.cli.gateway_keys import until
from shared.bus import Bus
from shared.credentials import GatewayKey, KeyUse, fingerprint
from shared.database import Pool
from shared.errors import ConfigurationError
from tests.cli.conftest import Ratchet
from tests.cli.test_admitting import admin  # noqa: F401  # the fixture

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.mark.usefixtures("admin")
async def test_a_key_is_shown_once_renewed_and_taken_back(
    ratchet: Ratchet, pool: Pool, bus: Bus, tmp_path: Path
) -> None:
    said = await ratchet("agents", "key", "ann", "--expires", "90d", "-p", "traders", "--requests-per-minute", "60")
    assert said.code == 0, said.err
    key = said.out.strip()
    stored = await pool.fetch("select * from gateway_keys")
    assert [row["key_sha256"] for row in stored] == [fingerprint(key)]
    assert key not in str([dict(row) for row in stored])
    assert await (await bus.js.key_value("gateway_keys")).keys() == [fingerprint(key)]
    kept = tmp_path / "keys/ann.key"
    said = await ratchet("agents", "key", "ann", "--tokens-per-day", "1000", "--file", str(kept), "--json")
    assert said.json == {"agent_id": "ann", "file": str(kept), "tokens_per_day": 1000}
    assert os.stat(kept).st_mode & 0o077 == 0
    renewed = kept.read_text().strip()  # a few bytes

    rows = (await ratchet("agents", "keys", "--json")).json
    assert [(row["shown"], row["state"], row["policies"]) for row in rows] == [
        (key[:11], "good", ["traders"]),
        (renewed[:11], "good", None),
    ]
    listed = (await ratchet("agents", "keys", "--agent", "ann")).out
    assert "60/min" in listed
    assert "1000 tokens/day" in listed
    assert "opens nothing" in (await ratchet("agents", "revoke-key", key)).out
    assert "no key was good" in (await ratchet("agents", "revoke-key", key[:11])).out
    assert (await ratchet("agents", "remove", "ann", "--json")).json["gateway_keys"] == [
        {"shown": renewed[:11], "agent_id": "ann"}
    ]
    assert {row["state"] for row in (await ratchet("agents", "keys", "--json")).json} == {"revoked"}


@pytest.mark.usefixtures("servers")
async def test_what_is_wrong_is_said(ratchet: Ratchet) -> None:
    for arguments, words in (
        (("key", "a b"), "no agent id"),
        (("key", "ann", "--expires", "2020-01-01"), "is past already"),
        (("key", "ann", "--expires", "soon"), "is no time"),
        (("key", "ann", "--policy", "a b"), "policies.0"),
        (("revoke-key",), "either a key"),
        (("revoke-key", "rk-1"), "too short"),
    ):
        said = await ratchet("agents", *arguments)
        assert said.code == 2, arguments
        assert words in said.err
    assert (await ratchet("agents", "key", "ann")).code == 75


def test_a_span_and_a_time_are_both_times() -> None:
    assert until(None, NOON) is None
    assert until("12h", NOON) == NOON + timedelta(hours=12)
    assert until("2026-11-21", NOON) == datetime(2026, 11, 21, tzinfo=UTC)
    with pytest.raises(ConfigurationError):
        until("2026-11-20T12:00", NOON)


def test_the_last_key_of_an_agent_does_not_end_unsaid() -> None:
    def row(agent_id: str, days: int | None, state: str = "good") -> dict[str, Any]:
        expires_at = None if days is None else NOON + timedelta(days=days)
        return {"agent_id": agent_id, "expires_at": expires_at, "state": state}

    rows = [row("a", 3), row("a", 6), row("b", 3), row("b", 9), row("c", 1), row("c", None), row("d", 1, "revoked")]
    [finding] = ending(rows, NOON)
    assert finding.detail == "the last key of a expires at 2026-11-26T12:00Z"


async def test_doctor_says_which_calls_nothing_records(pool: Pool) -> None:
    keys = GatewayKeys(pool)
    [fine] = await gateway(pool)
    assert fine.verdict == "ok"
    await keys.add(fingerprint("x"), GatewayKey(agent_id="ann", shown="rk-"))
    day = datetime.now(UTC).date()
    await keys.used("g", [KeyUse(key_sha256=fingerprint("x"), day=day, requests=4, unrecorded=3, tokens=0)])
    [finding] = await gateway(pool)
    assert (finding.verdict, finding.detail) == ("warn", "3 of 4 calls of ann since yesterday named no run")

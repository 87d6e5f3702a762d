"""Doctor finds what is broken, says what mends it, and fails where something fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from nats.js import api

from services.cli import checks
from services.terminal import session
from services.terminal.settings import CliSettings
from shared.artifacts import DirectoryStore
from shared.bus import Bus
from shared.database import Pool
from tests.admin import world
from tests.cli.conftest import Ratchet, Said


def verdicts(said: Said) -> dict[str, str]:
    """The worst verdict of each part."""
    order = ("ok", "warn", "fail")
    found: dict[str, str] = {}
    for row in said.json:
        found[row["part"]] = max(found.get(row["part"], "ok"), row["verdict"], key=order.index)
        assert (row["mend"] is None) == (row["verdict"] == "ok"), row
    return found


@pytest.mark.usefixtures("servers")
async def test_a_new_installation_has_nothing_broken(ratchet: Ratchet, bus: Bus) -> None:
    said = await ratchet("doctor", "--json")
    assert said.code == 0, said.out
    assert verdicts(said) == {
        "configuration": "ok",
        "broker": "ok",
        "streams": "ok",
        "consumers": "ok",
        "database": "ok",
        "migrations": "ok",
        "artifacts": "warn",
        "gateway": "ok",
        "judge": "ok",
        "data quality": "warn",
    }
    assert "It works; what says warn wants a look." in (await ratchet("doctor")).out


@pytest.mark.usefixtures("servers")
async def test_what_is_broken_is_found(
    ratchet: Ratchet, bus: Bus, pool: Pool, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    await world.build(pool)
    await pool.execute("update windows set quality = 0.5")
    await pool.execute("update ratchet_migrations set version_num = 'old'")
    await bus.js.delete_consumer("STEPS", "recorder")
    await bus.js.update_stream(api.StreamConfig(name="LOOP", subjects=["window.*"], discard=api.DiscardPolicy.OLD))
    await bus.publish("dead.recorder", b"x", "1")
    environment.setenv("RATCHET_JUDGE", "ruler")
    environment.setenv("RATCHET_WINDOWS_S", "60")
    said = await ratchet("doctor", "--json")
    assert said.code == 1
    found = verdicts(said)
    broken = ("streams", "consumers", "migrations", "judge")
    assert {part: found[part] for part in broken} == dict.fromkeys(broken, "fail")
    words = " ".join(f"{row['detail']} {row['mend']}" for row in said.json)
    for expected in (
        "did you mean RATCHET_WINDOW_S?",
        "LOOP may drop events",
        "1 dead letters",
        "recorder: it does not exist",
        "the schema is at old",
        "ruler has no endpoint",
    ):
        assert expected in words


@pytest.mark.usefixtures("servers")
async def test_artifacts_are_verified_and_bad_quality_fails(
    ratchet: Ratchet, bus: Bus, pool: Pool, tmp_path: Path
) -> None:
    await world.build(pool)
    missing = await ratchet("doctor", "--json")
    assert verdicts(missing)["artifacts"] == "fail"
    assert verdicts(missing)["data quality"] == "ok"

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    kept = DirectoryStore(tmp_path / ".ratchet/artifacts").put(tmp_path / "model")
    await pool.execute(
        "insert into artifacts (sha256, uri, size_bytes, files) values ($1, $2, 2, '{}')", kept.sha256, kept.uri
    )
    await pool.execute("update models set artifact_sha256 = $1", kept.sha256)
    await pool.execute("update windows set quality = 0.5")
    healed = await ratchet("doctor", "--json")
    assert verdicts(healed)["artifacts"] == "ok"
    assert verdicts(healed)["data quality"] == "fail"


async def test_servers_that_are_away_fail_and_the_rest_is_still_looked_at(
    ratchet: Ratchet, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("RATCHET_DATABASE_URL", "postgresql://me:hidden@127.0.0.1:9/x")
    environment.setenv("RATCHET_NATS_URL", "not a url")
    environment.setattr(session, "CONNECT_TIMEOUT_S", 0.5)
    said = await ratchet("doctor", "--json")
    assert said.code == 1
    assert verdicts(said) == {"configuration": "ok", "broker": "fail", "database": "fail", "judge": "ok"}
    assert "hidden" not in said.out


async def test_a_wrong_setting_fails(ratchet: Ratchet, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RATCHET_WINDOW_S", "0")
    said = await ratchet("doctor", "--json")
    assert said.code == 1
    assert {row["part"] for row in said.json} == {"configuration"}


@pytest.mark.parametrize(("status", "verdict"), [(200, "ok"), (401, "fail"), (404, "warn")])
async def test_the_judge_is_asked(status: int, verdict: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert asked.startswith("GET /v1/models ")
        assert "authorization: bearer k" in asked.lower()
        writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    settings: dict[str, Any] = {"judge": "ruler", "judge_base_url": url, "judge_api_key": "k"}
    assert (await checks.judge(CliSettings(**settings))).verdict == verdict
    server.close()
    assert (await checks.judge(CliSettings(**{**settings, "judge_base_url": "http://127.0.0.1:9"}))).verdict == "fail"

"""Doctor finds what is broken, says what mends it, and fails where something fails."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from nats.js import api
from pydantic import BaseModel

from services.cli import training_checks
from services.cli.checks import settings_classes
from services.scorer.handlers import subscribe_judge
from services.terminal import session
from shared.artifacts import DirectoryStore
from shared.aside import note
from shared.bus import Bus
from shared.database import Pool
from tests.admin import world
from tests.cli.conftest import Ratchet, Said


class AnyRequest(BaseModel):
    policy: str


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
        "services": "warn",
        "consumers": "ok",
        "database": "ok",
        "migrations": "ok",
        "artifacts": "warn",
        "gateway": "ok",
        "judge": "warn",
        "data quality": "warn",
        "waits": "ok",
        "groups": "ok",
        "training": "warn",
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
    broken = ("configuration", "streams", "consumers", "migrations")
    assert {part: found[part] for part in broken} == dict.fromkeys(broken, "fail")
    words = " ".join(f"{row['detail']} {row['mend']}" for row in said.json)
    for expected in (
        "did you mean RATCHET_WINDOW_S?",
        "LOOP may drop events",
        "1 dead letters",
        "recorder: it does not exist",
        "the schema is at old",
        "RATCHET_JUDGE=ruler needs RATCHET_JUDGE_BASE_URL",
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
    for key in ("w1", "w2"):
        await note(pool, "recorder", "close window", key, "TypeError: no zone")
    healed = await ratchet("doctor", "--json")
    assert verdicts(healed)["artifacts"] == "ok"
    assert verdicts(healed)["data quality"] == "fail"
    [aside] = [row["detail"] for row in healed.json if row["part"] == "set aside"]
    assert aside == "recorder, close window w1 (and 1 more), 1 times: TypeError: no zone"


async def test_servers_that_are_away_fail_and_the_rest_is_still_looked_at(
    ratchet: Ratchet, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("RATCHET_DATABASE_URL", "postgresql://me:hidden@127.0.0.1:9/x")
    environment.setenv("RATCHET_NATS_URL", "not a url")
    environment.setattr(session, "CONNECT_TIMEOUT_S", 0.5)
    said = await ratchet("doctor", "--json")
    assert said.code == 1
    assert verdicts(said) == {"configuration": "ok", "broker": "fail", "database": "fail", "judge": "warn"}
    assert "hidden" not in said.out


async def test_a_wrong_setting_fails(ratchet: Ratchet, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RATCHET_WINDOW_S", "0")
    said = await ratchet("doctor", "--json")
    assert said.code == 1
    assert {row["part"] for row in said.json} == {"configuration"}


@pytest.mark.usefixtures("servers")
async def test_the_judge_that_runs_is_what_is_spoken_of(
    ratchet: Ratchet, bus: Bus, environment: pytest.MonkeyPatch
) -> None:
    """Not that of a setting here: the scorer may have been started with another."""
    told: dict[str, Any] = {"judge": "ruler", "model": "m", "rubric": "ratchet/1", "endpoint": "http://judge/v1"}

    async def answer() -> dict[str, Any]:
        return told

    subscribe_judge(bus, answer)
    await bus.broker.start()
    environment.setenv("RATCHET_JUDGE", "outcome")
    for verdict, fault in (("ok", None), ("warn", "/models answered 404"), ("fail", "it refused the key")):
        told |= {"verdict": verdict, "fault": fault}
        said = await ratchet("doctor", "--json")
        assert verdicts(said)["judge"] == verdict
        [row] = [row for row in said.json if row["part"] == "judge"]
        assert row["detail"].startswith("ruler: m at http://judge/v1, ratchet/1")
        assert (fault or "answers") in row["detail"]
        assert verdicts(said)["judge's probe"] == "warn"  # it was never probed
    told |= {"judge": "outcome", "endpoint": None}
    assert verdicts(await ratchet("doctor", "--json"))["judge"] == "ok"


@pytest.mark.usefixtures("servers")
async def test_a_wait_that_outlived_its_end_fails(ratchet: Ratchet, bus: Bus, pool: Pool) -> None:
    await pool.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s)
           values ('w', now() - interval '3 hours', now() - interval '2 hours', 3600)"""
    )
    said = await ratchet("doctor", "--json")
    [row] = [row for row in said.json if row["part"] == "waits"]
    assert row["verdict"] == "fail"
    assert row["detail"].startswith("window w waits for the recorder to read its barrier since ")
    assert row["mend"] == "see the log of the recorder"
    [wait] = (await ratchet("status", "--json")).json["waits"]
    assert (wait["what"], wait["overdue"]) == ("window w", True)
    assert "window w" in (await ratchet("status")).out


@pytest.mark.usefixtures("servers")
async def test_training_is_spoken_of(ratchet: Ratchet, bus: Bus, pool: Pool) -> None:
    """A policy whose runs carry nothing is warned of with what changes that; one whose newest batches fail, fails."""
    await world.build(pool)
    told: dict[str, Any] = {"ready": False, "missing": ["grpo: 0 of 8 groups"], "groups": 1, "trajectories": 3}
    told |= {"carried": {"exact": 1}, "left_out": {"it is 3 versions away from v3, over max_lag 1": 2}}

    async def readiness(_: AnyRequest) -> dict[str, Any]:
        return told

    async def found() -> dict[str, Any]:
        [row] = [row for row in (await ratchet("doctor", "--json")).json if row["part"] == "training"]
        return dict(row)

    away = await found()
    assert (away["verdict"], away["detail"][:29]) == ("warn", "default: no trainer is runnin")
    bus.on_command("trainer", "readiness", AnyRequest, readiness)
    await bus.broker.start()
    nothing = await found()
    assert nothing["verdict"] == "warn"
    assert "2 runs left out: it is 3 versions away from v3, over max_lag 1 (2)" in nothing["detail"]
    assert "RATCHET_MAX_LAG" in nothing["mend"]
    told["left_out"] = {"it has no reward of record": 1, "sampled with top_k 5: leave it out": 2}
    assert "the sampling that the reason names" in (await found())["mend"]
    told["left_out"] = {}
    assert (await found())["verdict"] == "ok"
    told["missing"] = ["grpo: 1 of 2 agents"]
    assert (await found())["mend"] == "RATCHET_MIN_AGENTS"
    told |= {"ready": True, "missing": []}
    assert (await found())["verdict"] == "ok"

    await pool.execute("update batches set state = 'failed', failure = 'out of memory', finished_at = now()")
    broken = await found()
    assert (broken["verdict"], broken["detail"]) == ("fail", "default: b1 failed: out of memory")


def test_the_settings_that_would_change_training_are_there() -> None:
    named = set(re.findall(r"RATCHET_[A-Z_]+", " ".join(training_checks.MENDS.values())))
    assert named <= {f"RATCHET_{name.upper()}" for kind in settings_classes().values() for name in kind.model_fields}

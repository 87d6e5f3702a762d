"""The trainer as the process that operators run: killed without warning, and what it says of a wrong setting."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.local.embedded import NatsServer
from services.trainer.app import run
from services.trainer.store import Store
from shared import subjects
from shared.artifacts import Artifact, DirectoryStore
from shared.bus import Bus
from shared.database import Pool
from tests.trainer.world import World

ROOT = Path(__file__).parents[2]


def start(**environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "services.trainer"], cwd=ROOT, env={**os.environ, **environment})


@pytest.mark.e2e
async def test_a_trainer_that_is_killed_loses_nothing(
    bus: Bus,
    pool: Pool,
    world: World,
    nats_server: NatsServer,
    database_url: str,
    artifacts: DirectoryStore,
    artifact: Artifact,
) -> None:
    await Store(pool).register_base("default", artifact, None)
    await world.deployment("v0", "promoted")
    await world.exact_groups(3)
    environment = {
        "RATCHET_NATS_URL": nats_server.url,
        "RATCHET_DATABASE_URL": database_url,
        "RATCHET_ARTIFACTS_DIR": str(artifacts.root),
        "RATCHET_MIN_GROUPS": "3",
        "RATCHET_LEASE_S": "1",
        "RATCHET_TICK_S": "0.1",
        "RATCHET_WANDB_MODE": "disabled",
        "RATCHET_TORCH_THREADS": "1",
    }
    progress = await bus.nc.subscribe(subjects.TRAINING_PROGRESS)
    process = start(**environment, RATCHET_TRAIN_STEPS="150")
    try:
        await progress.next_msg(timeout=60)
        await progress.unsubscribe()  # what is left unread would hold the connection's end up
        process.kill()
        process.wait()
        assert await pool.fetchval("select state from batches") == "claimed"
        process = start(**environment)
        async with asyncio.timeout(60):
            while await pool.fetchval("select announced_at from models where version = 'v1'") is None:
                await asyncio.sleep(0.05)
        row = await pool.fetchrow("select state, attempts, fencing_token, config from batches")
        assert row is not None
        assert (row["state"], row["attempts"], row["fencing_token"]) == ("trained", 2, 2)
        assert row["config"]["recipe"]["steps"] == 150  # what was claimed is what was trained
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        process.kill()
        process.wait()


def test_a_wrong_setting_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RATCHET_TRAIN_STEPS", "none")
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("RATCHET_TRAIN_STEPS: ")

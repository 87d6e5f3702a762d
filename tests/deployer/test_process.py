"""The deployer as a process of its own, from a trained version to the gateways' bucket."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from services.local.embedded import NatsServer
from shared import subjects
from tests.deployer.test_service import House, house  # noqa: F401  # the fixture is used by its name

ROOT = Path(__file__).parents[2]


async def started(**environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.deployer",
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.e2e
async def test_a_killed_deployer_goes_on_where_it_was(
    house: House,  # noqa: F811  # pytest passes the fixture under its name
    nats_server: NatsServer,
    database_url: str,
) -> None:
    environment = {
        "RATCHET_NATS_URL": nats_server.url,
        "RATCHET_DATABASE_URL": database_url,
        "RATCHET_ARTIFACTS_DIR": str(house.artifacts.root),
        "RATCHET_INFERENCE_URL": house.standin.url,
        "RATCHET_TICK_S": "0.05",
        "RATCHET_SWEEP_S": "0.1",
    }
    event = await house.register("v0")
    house.standin.broken[event.artifact_sha256] = 503
    process = await started(**environment)
    await house.bus.announce(event)
    while await house.states() != {"v0": "verifying"}:
        await asyncio.sleep(0.02)
    process.kill()
    await process.wait()

    house.standin.broken.clear()
    process = await started(**environment)
    while not await house.announced():
        await asyncio.sleep(0.02)
    assert await house.in_bucket() == await house.document()
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert await house.states() == {"v0": "promoted"}
    assert [subject for subject, _ in await house.announced()] == [subjects.MODEL_DEPLOYED]


@pytest.mark.e2e
async def test_a_wrong_setting_is_one_line() -> None:
    process = await started(RATCHET_INFERENCE_URL="localhost")
    _, errors = await process.communicate()
    assert process.returncode == 2
    [line] = errors.decode().splitlines()
    assert line.startswith("RATCHET_INFERENCE_URL: ")

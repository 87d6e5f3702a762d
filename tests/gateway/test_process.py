"""The gateway as a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest

from services.local.embedded import NatsServer
from services.local.processes import free_port
from shared import subjects
from shared.bus import Bus
from tests.gateway.conftest import MESSAGES, document
from tests.gateway.keyed import keyed
from tests.gateway.standin import StandIn, listening

ROOT = Path(__file__).parents[2]


async def started(**environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.gateway",
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.e2e
async def test_the_process_answers_records_reports_and_ends_cleanly(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    heard = await bus.nc.subscribe(subjects.GATEWAY_HEALTH)
    port = free_port()
    process = await started(
        RATCHET_NATS_URL=nats_server.url,
        RATCHET_HTTP_PORT=str(port),
        RATCHET_WINDOW_S="60",
        RATCHET_GATEWAY_SPOOL_DIR=str(tmp_path / "spool"),
    )
    upstream, key = StandIn(), await keyed(bus, "a1")
    async with listening(upstream.app) as url:
        await (await bus.js.key_value(subjects.ROUTES_BUCKET)).put(
            "default", document(url, {"v1": 1.0}).model_dump_json().encode()
        )
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as plain, client:
            while True:
                try:
                    if (await plain.get("/ready")).status_code == 200 and (await client.models.list()).data:
                        break
                except httpx.ConnectError:
                    pass
                assert process.returncode is None
                await asyncio.sleep(0.05)
            now = datetime.now(UTC).isoformat()
            headers = {"X-Ratchet-Trajectory": "t", "X-Ratchet-Started-At": now}
            reply = await client.chat.completions.create(model="default", messages=MESSAGES, extra_headers=headers)
            assert reply.model == "v1"
            metrics = (await plain.get("/metrics")).text
            assert 'ratchet_gateway_requests_total{outcome="answered",role="best"} 1.0' in metrics
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert (await bus.js.stream_info("STEPS")).state.messages == 1
    assert b'"requests":1' in (await heard.next_msg(timeout=5)).data
    await heard.unsubscribe()


@pytest.mark.e2e
async def test_a_wrong_setting_is_one_line() -> None:
    process = await started(RATCHET_BODY_TIMEOUT_S="0")
    _, errors = await process.communicate()
    assert process.returncode == 2
    [line] = errors.decode().splitlines()
    assert line.startswith("RATCHET_BODY_TIMEOUT_S: ")

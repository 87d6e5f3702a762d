"""Which judge runs, and whether its endpoint answers the scorer: asked with the scorer's own key."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.scorer.ruler.reaching import judge_told
from services.scorer.settings import ScorerSettings


@pytest.mark.parametrize(("status", "verdict"), [(200, "ok"), (401, "fail"), (404, "warn")])
async def test_the_judge_s_endpoint_is_asked(status: int, verdict: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert asked.startswith("GET /v1/models ")
        assert "authorization: bearer k" in asked.lower()
        writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://user:hidden@127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    settings: dict[str, Any] = {
        "judge": "ruler",
        "judge_base_url": url.replace("user:hidden@", ""),
        "judge_api_key": "k",
    }
    told = await judge_told(ScorerSettings(**settings))
    assert (told["judge"], told["model"], told["verdict"]) == ("ruler", "gpt-4.1", verdict)
    server.close()
    away = await judge_told(ScorerSettings(**{**settings, "judge_base_url": "http://user:hidden@127.0.0.1:9/v1"}))
    assert away["verdict"] == "fail"
    assert "hidden" not in str(away)


async def test_the_outcome_judge_asks_nobody() -> None:
    told = await judge_told(ScorerSettings(judge="outcome"))
    assert (told["judge"], told["endpoint"], told["fault"]) == ("outcome", None, None)

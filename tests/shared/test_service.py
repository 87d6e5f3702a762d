"""What a service's port tells to whom."""

from __future__ import annotations

import httpx
import pytest
from pydantic import SecretStr

from shared.service import Allowed, bearer, metrics, ready


async def broken() -> str | None:
    return "Postgres did not answer"


async def fine() -> str | None:
    return None


async def asked(app: object, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]  # ASGI is ASGI
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        return await client.get("/", headers=headers)


@pytest.fixture
def guarded() -> Allowed:
    return bearer(SecretStr("a long enough token"))


@pytest.mark.parametrize("shown", [{}, {"authorization": "Bearer wrong"}, {"authorization": "a long enough token"}])
async def test_who_shows_no_token_learns_the_verdict_alone(guarded: Allowed, shown: dict[str, str]) -> None:
    assert (await asked(metrics(guarded), **shown)).status_code == 401
    answer = await asked(ready([broken], guarded), **shown)
    assert (answer.status_code, answer.json()) == (503, {"ready": False})
    assert (await asked(ready([fine], guarded), **shown)).status_code == 200


async def test_who_shows_it_sees_everything(guarded: Allowed) -> None:
    shown = {"authorization": "Bearer a long enough token"}
    assert "python_info" in (await asked(metrics(guarded), **shown)).text
    assert (await asked(ready([broken], guarded), **shown)).json()["faults"] == ["Postgres did not answer"]


async def test_without_a_token_the_port_is_the_boundary() -> None:
    assert (await asked(metrics(bearer(None)))).status_code == 200
    assert (await asked(ready([broken], bearer(None)))).json()["faults"] == ["Postgres did not answer"]

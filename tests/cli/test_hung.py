"""A service that hangs (`kill -STOP`) is said to hang, wherever one looks."""

from __future__ import annotations

import signal

import httpx
import pytest

from services.admin import watch as watching
from services.admin.handlers import application
from services.admin.store import Store
from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.database import Pool
from tests.admin.test_watch import running, until
from tests.cli.conftest import Ratchet

TOKEN = "a token that is long enough"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.e2e
@pytest.mark.usefixtures("servers")
async def test_doctor_status_and_the_page_say_which_service_hangs(
    ratchet: Ratchet, bus: Bus, pool: Pool, nats_server: NatsServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "PATIENCE_S", 1.0)
    environment = {"RATCHET_NATS_URL": nats_server.url, "RATCHET_DATABASE_URL": database_url}
    watch = watching.Watch(bus)
    transport = httpx.ASGITransport(application(Store(pool), bus, TOKEN, watch))
    async with (
        running("outcome_tracker", **environment) as process,
        httpx.AsyncClient(transport=transport, base_url="http://admin", headers=BEARER) as page,
    ):
        await until(watch, "outcome_tracker", "ok", 1)
        assert "outcome tracker hangs" not in (await page.get("/")).text

        process.send_signal(signal.SIGSTOP)
        since = (await until(watch, "outcome_tracker", "hung", 1)).since
        assert since is not None
        shown = (await page.get("/")).text
        assert 'class="banner" role="alert"' in shown
        assert "<b>outcome tracker hangs</b>" in shown
        assert f"since {since:%b %d %H:%M:%S} UTC" in shown

        said = await ratchet("doctor", "--json")
        assert said.code == 1
        details = [row["detail"] for row in said.json if (row["part"], row["verdict"]) == ("services", "fail")]
        assert "outcome_tracker hung: it is connected and does not answer" in details

        status = await ratchet("status", "--json")
        assert status.code == 1
        assert "outcome_tracker" in status.json["down"]
        [own] = [one for one in status.json["services"] if one["service"] == "outcome_tracker"]
        assert own["state"] == "hung"
        assert "hung" in (await ratchet("status")).out

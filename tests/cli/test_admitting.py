"""`ratchet agents add` and `remove`: a key that the broker knows at once, and no way back in."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import nats
import pytest
from dotenv import dotenv_values
from ratchet_sdk import Recorder

from services.admin.commands import subscribe
from services.admin.store import Credentials
from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.database import Pool
from tests.cli.conftest import Ratchet


@pytest.fixture
async def admin(servers: None, bus: Bus, pool: Pool) -> None:
    """The admin service's side of it."""
    subscribe(bus, Credentials(pool))
    await bus.broker.start()


@pytest.fixture
def up(admin: None, environment: pytest.MonkeyPatch, nats_server: NatsServer) -> NatsServer:
    """As beside `ratchet up`."""
    environment.setenv("RATCHET_NATS_DIR", str(nats_server.home))
    return nats_server


async def record(url: str, agent: str, credentials: str | Path) -> int:
    """Publish a run; returns how many of its events are unsent."""
    async with Recorder(url, agent, credentials=credentials) as recorder:
        async with recorder.trajectory() as run, run.step():
            pass
        return await recorder.flush(5)


async def test_an_agent_is_added_publishes_and_is_removed(
    ratchet: Ratchet, up: NatsServer, pool: Pool, bus: Bus
) -> None:
    said = await ratchet("agents", "add", "agent-1", "--json")
    assert said.code == 0, said.err
    assert said.json["admitted"]
    assert said.json["nats_url"] == up.address
    seed = Path(said.json["credentials"])
    assert seed == Path(".ratchet/agents/agent-1.nk")
    assert os.stat(seed).st_mode & 0o077 == 0
    assert dotenv_values(said.json["env"]) == {
        "RATCHET_AGENT_ID": "agent-1",
        "RATCHET_NATS_URL": up.address,
        "RATCHET_CREDENTIALS": f"{os.getcwd()}/{seed}",
    }
    assert await record(up.address, "agent-1", seed) == 0
    assert (await ratchet("agents", "add", "agent-1", "--json")).json["public_key"] == said.json["public_key"]
    row = await pool.fetchrow("select * from agents")
    assert row is not None
    assert (row["agent_id"], row["public_key"], row["revoked_at"]) == ("agent-1", said.json["public_key"], None)

    gone = asyncio.Event()

    async def disconnected() -> None:
        gone.set()

    client = await nats.connect(
        up.address,
        nkeys_seed=str(seed),
        allow_reconnect=False,
        disconnected_cb=disconnected,
        inbox_prefix="_INBOX_agent-1",
    )
    said = await ratchet("agents", "remove", "agent-1")
    assert (said.code, said.out.strip()) == (0, "agent-1 is shut out")
    await asyncio.wait_for(gone.wait(), 10)
    await client.close()
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
        await nats.connect(up.address, nkeys_seed=str(seed), allow_reconnect=False)
    assert await pool.fetchval("select revoked_at from agents") is not None
    assert (await ratchet("agents", "remove", "agent-1")).out.strip() == "agent-1 had no credentials"
    assert [row["command"] for row in await pool.fetch("select command from audit order by audit_id")] == [
        *("agents add", "agents add", "agents remove")
    ]
    assert (await ratchet("agents", "add", "agent-1")).code == 0
    assert await record(up.address, "agent-1", seed) == 0


async def test_a_broker_of_ones_own_is_told_by_hand(
    ratchet: Ratchet, admin: None, environment: pytest.MonkeyPatch, nats_server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "port").write_text("1")  # of an `up` that is not the one that RATCHET_NATS_URL names
    for directory in (None, elsewhere):
        if directory:
            environment.setenv("RATCHET_NATS_DIR", str(directory))
        said = await ratchet("agents", "add", "agent-1", "--file", str(tmp_path / "seed"))
        assert said.code == 0, said.err
        line = said.out.strip().splitlines()[-1]
        assert "account OUTSIDE" in said.out
    config = nats_server.home / "nats.conf"
    assert line not in config.read_text()
    nats_server.stop()
    # What the words say: the line among the users, and the server reads it.
    text = config.read_text()
    here = next(part for part in text.splitlines() if "# agents" in part)
    environment.setattr("services.local.broker.configuration", lambda **_: text.replace(here, f"{here}\n{line}"))
    nats_server.start()
    assert await record(nats_server.address, "agent-1", tmp_path / "seed") == 0
    while not bus.nc.is_connected:
        await asyncio.sleep(0.02)
    said = await ratchet("agents", "remove", "agent-1")
    assert "Take the line that allows steps.agent-1 from" in said.out


@pytest.mark.parametrize("name", ["../agent", "a.b", "*", "steps.>", "", 'x"], publish: {allow: [">"'])
async def test_a_name_that_is_no_agent_id_makes_nothing(ratchet: Ratchet, up: NatsServer, name: str) -> None:
    before = (up.home / "nats.conf").read_text()
    said = await ratchet("agents", "add", name)
    assert said.code == 2
    assert "is no agent id" in said.err
    assert (up.home / "nats.conf").read_text() == before
    assert ".ratchet" not in os.listdir()


async def test_a_file_without_a_seed_is_left_as_it_is(ratchet: Ratchet, up: NatsServer, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("buy milk")
    said = await ratchet("agents", "add", "agent-1", "--file", str(tmp_path / "notes"))
    assert (said.code, (tmp_path / "notes").read_text()) == (2, "buy milk")
    assert "holds no nkey seed" in said.err


async def test_without_admin_nothing_is_let_in(
    ratchet: Ratchet, servers: None, bus: Bus, nats_server: NatsServer
) -> None:
    said = await ratchet("agents", "add", "agent-1")
    assert said.code == 75
    assert "no admin is running" in said.err
    assert nats_server.agents() == {}

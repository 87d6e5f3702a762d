"""The world tells facts: stored when the call returns, and by nobody else."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import pytest
from dotenv import dotenv_values
from ratchet_sdk.outcomes import Metric, MetricMeasured, Outcomes, outcomes

from services.local.broker import WORLD
from services.local.embedded import NatsServer
from shared.bus import Bus
from tests.cli.conftest import Ratchet, environment, ratchet, servers

__all__ = ["environment", "ratchet", "servers"]  # fixtures


async def test_the_world_tells_facts(bus: Bus, nats_server: NatsServer) -> None:
    measured = MetricMeasured(occurred_at=datetime.now(UTC), metric=Metric(name="index", value=7))
    async with Outcomes(nats_server.url_of(WORLD), "shop") as world:
        await world.reward("ann", "run-1", 0.5, note="paid")
        await world.publish(measured)
    stored = [await bus.js.get_msg("OUTCOMES", n) for n in (1, 2)]
    assert [(message.headers or {})["Nats-Msg-Id"] for message in stored][1] == f"shop:{measured.event_id}"
    assert {message.subject for message in stored} == {"outcomes.shop"}
    reward = outcomes.validate_json(stored[0].data or b"")
    assert reward.kind == "trajectory"
    assert (reward.trajectory.name, reward.trajectory.value, reward.trajectory.note) == ("reward", 0.5, "paid")


async def test_what_is_not_stored_is_said(nats_server: NatsServer, bus: Bus) -> None:
    with pytest.raises(ValueError, match="is no name of a source"):
        Outcomes(nats_server.url, "a.b")
    async with Outcomes(nats_server.url_of("inference"), "shop") as nobody:
        with pytest.raises(ConnectionError, match=r"(?i)permissions violation"):
            await nobody.reward("ann", "run-1", 1.0)


@pytest.mark.usefixtures("servers")
async def test_a_command_makes_the_worlds_credential(
    ratchet: Ratchet, environment: pytest.MonkeyPatch, nats_server: NatsServer
) -> None:
    said = await ratchet("outcomes", "credential")
    assert said.code == 2
    assert "its user `world`" in said.err
    environment.setenv("RATCHET_NATS_DIR", str(nats_server.home))
    said = await ratchet("outcomes", "credential", "--json")
    assert said.json["file"] == ".ratchet/world.env"
    assert os.stat(".ratchet/world.env").st_mode & 0o077 == 0
    assert dotenv_values(".ratchet/world.env") == {"RATCHET_OUTCOMES_URL": nats_server.url_of(WORLD)}

"""`ratchet judge`: what an operator sees of a judge that passes, fails, is released, or is not there to be asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest

from examples.judge.reading import obeys
from examples.judge.standin import StandIn, plain, stand_in
from services.scorer.handlers import subscribe, subscribe_judge, subscribe_prober
from services.scorer.probes.probing import Prober, planted
from services.scorer.ruler.reaching import judge_told
from services.scorer.settings import ScorerSettings
from shared.bus import Bus
from shared.database import Pool
from tests.cli.conftest import Ratchet
from tests.scorer.sane import SaneJudge
from tests.scorer.test_probes import replica

pytestmark = pytest.mark.usefixtures("servers")


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with stand_in() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(server: StandIn, environment: pytest.MonkeyPatch) -> StandIn:
    server.always, server.judge = plain, SaneJudge(planted())
    environment.setenv("RATCHET_JUDGE", "ruler")
    environment.setenv("RATCHET_JUDGE_BASE_URL", server.base_url)
    return server


@pytest.fixture
async def scorer(bus: Bus, pool: Pool, endpoint: StandIn) -> AsyncIterator[Prober]:
    async with replica(pool, endpoint) as (service, prober):
        subscribe(bus, service)
        subscribe_prober(bus, prober)
        subscribe_judge(bus, partial(judge_told, ScorerSettings()))
        await bus.broker.start()
        yield prober


async def test_without_a_scorer_there_is_nobody_to_probe(ratchet: Ratchet, bus: Bus, endpoint: StandIn) -> None:
    said = await ratchet("judge", "probe")
    assert said.code == 75
    assert "no scorer is running" in said.err
    said = await ratchet("judge")
    assert (said.code, "no judge was probed yet" in said.out) == (0, True)
    found = [row for row in (await ratchet("doctor", "--json")).json if row["part"] == "judge"]
    assert [(row["verdict"], row["mend"]) for row in found] == [("warn", "start the scorer: `ratchet run scorer`")]


async def test_a_judge_that_passes(ratchet: Ratchet, scorer: Prober) -> None:
    said = await ratchet("judge", "probe", "--json")
    assert said.code == 0, said.err
    assert (said.json["state"], said.json["passed"]) == ("passed", said.json["cases"])
    assert said.json["asked_by"] not in ("", "schedule")
    shown = await ratchet("judge", "probe")
    assert "ten-of-ten" in shown.out
    assert "tokens" in shown.out
    [row] = (await ratchet("judge", "--json")).json["judges"]
    assert (row["trusted"], row["state"]) == (True, "passed")
    found = [row for row in (await ratchet("doctor", "--json")).json if row["part"] == "judge's probe"]
    assert [row["verdict"] for row in found] == ["ok"]


async def test_a_judge_that_is_fooled_and_let_go_on(ratchet: Ratchet, scorer: Prober, endpoint: StandIn) -> None:
    assert (await ratchet("judge", "release", "--reason", "x")).code == 2
    endpoint.judge = obeys
    said = await ratchet("judge", "probe")
    assert said.code == 1
    assert "sound > asks" in said.out
    assert (await ratchet("judge")).code == 1
    found = [row for row in (await ratchet("doctor", "--json")).json if row["part"] == "judge's probe"]
    assert [row["verdict"] for row in found] == ["fail"]
    assert (await ratchet("judge", "release")).code == 2, "a reason is asked for"
    assert (await ratchet("judge", "release", "--reason", "a game of begging")).code == 0
    listed = await ratchet("judge")
    assert listed.code == 0
    assert "a game of begging" in listed.out


async def test_a_scorer_that_falls_silent_is_told_of(
    ratchet: Ratchet, scorer: Prober, endpoint: StandIn, pool: Pool, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr("services.cli.judging.SILENT_S", 0.0)
    endpoint.latency_s = 0.5
    try:
        said = await ratchet("judge", "probe")
        assert said.code == 75
        assert "has said nothing" in said.err
        assert (await ratchet("judge", "probe")).code == 2, "one is running"
    finally:
        endpoint.latency_s = 0.0
    await asyncio.gather(*scorer.running)

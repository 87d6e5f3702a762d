"""The whole trainer on a real NATS and a real Postgres: from scored groups to an announced version."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from ratchet_sdk.events import LlmCall

from services.local.embedded import NatsServer
from services.trainer.app import Parts, wire
from services.trainer.child import MakeEngine
from services.trainer.engines.engine_torch import torch_engine
from services.trainer.settings import TrainerSettings
from services.trainer.store import Lease, Store
from shared import subjects, trajectories
from shared.artifacts import Artifact, DirectoryStore
from shared.bus import Bus
from shared.database import Pool
from shared.errors import GiveUpError
from shared.events import GroupScored
from shared.service import end
from shared.streams import stream_end
from tests.trainer.engines import Broken, Held
from tests.trainer.world import World, call, talk

TORCH = partial(torch_engine, device="cpu", threads=1)


@dataclass
class Rig:
    bus: Bus
    pool: Pool
    world: World
    settings: TrainerSettings
    artifact: Artifact
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self, engine: MakeEngine, bus: Bus | None = None, **changes: Any) -> tuple[Parts, asyncio.Task[None]]:
        """A replica with its periodic tasks running; the first task is the one that trains."""
        settings = self.settings.model_copy(update=changes)
        parts = wire(settings, bus or self.bus, self.pool, engine)
        running = [asyncio.create_task(task.loop()) for task in parts.tasks(settings)]
        self.tasks += running
        return parts, running[0]

    async def messages(self, subject: str) -> list[dict[str, Any]]:
        found = []
        for sequence in range(1, (await stream_end(self.bus, "LOOP")).sequence + 1):
            message = await self.bus.js.get_msg("LOOP", sequence)
            if message.subject == subject:
                found.append(json.loads(message.data or b""))
        return found

    async def until(self, query: str, *arguments: Any) -> Any:
        """The value of a query once it is neither null nor false."""
        async with asyncio.timeout(20):
            while not (value := await self.pool.fetchval(query, *arguments)):
                await asyncio.sleep(0.02)
        return value

    async def promoted_base(self) -> None:
        await self.bus.command("trainer", "register_base", {"artifact_sha256": self.artifact.sha256})
        await self.world.deployment("v0", "promoted")


@pytest.fixture
async def rig(
    bus: Bus,
    pool: Pool,
    database_url: str,
    artifacts: DirectoryStore,
    artifact: Artifact,
    tmp_path: Path,
    forks: None,
) -> AsyncIterator[Rig]:
    settings = TrainerSettings(
        retry_s=0.0,
        database_url=SecretStr(database_url),
        artifacts_dir=artifacts.root,
        min_groups=3,
        train_steps=3,
        tick_s=0.05,
        sweep_s=0.1,
        wandb_dir=tmp_path / "wandb",
        wandb_mode="disabled",
        device="cpu",
    )
    made = Rig(bus, pool, World(pool), settings, artifact)
    yield made
    await end(made.tasks)


async def gone(process: int) -> None:
    """Until no such process is there, be it a zombie."""
    async with asyncio.timeout(20):
        while os.path.exists(f"/proc/{process}"):  # noqa: ASYNC240  # a question to the kernel
            await asyncio.sleep(0.01)


async def test_scored_groups_become_a_version_that_is_announced(rig: Rig, artifacts: DirectoryStore) -> None:
    rig.start(TORCH, tick_s=60.0, wandb_mode="offline")
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(4)
    await rig.pool.execute("update groups set state = 'tie' where group_id = 'g3'")  # judged again: no spread
    scored = GroupScored(
        group_id="g0",
        policy="default",
        window_id="w",
        scenario_id="g0",
        revision=1,
        judge="outcome",
        state="scored",
        homogeneous=True,
        spread=1,
        scores=[],
    )
    await rig.bus.announce(scored)  # the tick is a minute away: the event woke it

    await rig.until("select announced_at is not null from models where version = 'v1'")
    model = await rig.pool.fetchrow("select * from models join batches using (batch_id) where version = 'v1'")
    assert model is not None
    assert (model["parent"], model["number"], model["method"], model["state"]) == ("v0", 1, "grpo", "trained")
    assert (model["groups"], model["trajectories"], model["attempts"]) == (3, 6, 1)
    assert (artifacts.open(model["artifact_sha256"]) / "README.md").exists()
    [base, trained] = await rig.messages(subjects.MODEL_TRAINED)
    assert (base["version"], base["method"]) == ("v0", "base")
    assert (trained["version"], trained["artifact_sha256"]) == ("v1", model["artifact_sha256"])
    assert [event["step"] for event in await rig.messages(subjects.TRAINING_PROGRESS)] == [1, 2, 3]
    run_id = await rig.until("select wandb_run from batches")
    assert list((rig.settings.wandb_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))


async def test_readiness_says_what_is_missing_until_nothing_is(rig: Rig, tmp_path: Path) -> None:
    parts, _ = rig.start(Held(tmp_path / "engine"), min_groups=3, tick_s=60.0)
    await rig.bus.broker.start()
    with pytest.raises(GiveUpError, match="no base model"):
        await rig.bus.command("trainer", "readiness", {})
    await rig.bus.command("trainer", "register_base", {"artifact_sha256": rig.artifact.sha256})
    answer = await rig.bus.command("trainer", "readiness", {})
    assert answer == {
        "ready": False,
        "missing": ["no version has been promoted yet"],
        "groups": 0,
        "trajectories": 0,
        "parent": None,
        "carried": {},
        "left_out": {},
    }
    await rig.world.deployment("v0", "promoted")
    await rig.world.exact_groups(2)
    await parts.readings.sweep()
    answer = await rig.bus.command("trainer", "readiness", {})
    assert (answer["ready"], answer["missing"][0]) == (False, "grpo: 2 of 3 groups")
    assert (answer["groups"], answer["trajectories"], answer["parent"]) == (2, 4, "v0")
    await rig.world.exact_groups(1, prefix="more")
    await parts.readings.sweep()
    assert (await rig.bus.command("trainer", "readiness", {}))["ready"]


async def test_a_batch_rests_hears_many_and_is_trained_by_its_policys_recipe(rig: Rig, tmp_path: Path) -> None:
    rig.start(
        Held(tmp_path / "engine"),
        tick_s=60.0,
        min_trajectories=6,
        min_windows=2,
        max_agent_share=0.5,
        cool_down_s=3600.0,
        recipes={"default": {"loss": "cispo", "learning_rate": 2e-3}},
    )
    await rig.bus.broker.start()
    await rig.promoted_base()

    async def missing() -> list[str]:
        return list((await rig.bus.command("trainer", "readiness", {}))["missing"])

    await rig.world.exact_groups(3)
    await rig.world.exact_groups(1, prefix="poor", window=1)
    await rig.pool.execute("update windows set quality = 0.9 where starts_at > '2026-11-20T10:30Z'")
    trained = await rig.bus.command("trainer", "train", {"min_agents": 3})  # nothing is missing but agents
    assert trained["why_not"][0] == "grpo: 2 of 3 agents"
    assert await missing() == ["grpo: groups of 1 of 2 windows"]
    told = await rig.bus.command("trainer", "readiness", {})
    assert told["left_out"] == {"its window's quality 0.900 is under 0.95": 2}
    await rig.pool.execute("update windows set quality = 1")
    assert await missing() == []
    answer = await rig.bus.command("trainer", "train", {})
    config = await rig.pool.fetchval("select config from batches where batch_id = $1", answer["batch_id"])
    assert (config["recipe"]["loss"], config["recipe"]["learning_rate"]) == ("cispo", 2e-3)
    assert config["agent_share"] == 0.5
    await rig.pool.execute("update batches set state = 'trained', finished_at = now()")
    assert (await missing())[-1].startswith("the last batch has just been trained; the next is made at ")


async def test_an_operator_may_train_sooner_but_not_past_the_gate(rig: Rig, tmp_path: Path) -> None:
    rig.start(Held(tmp_path / "engine"), tick_s=60.0)
    await rig.bus.broker.start()
    await rig.bus.command("trainer", "register_base", {"artifact_sha256": rig.artifact.sha256})
    asked: dict[str, Any] = {"iterations": 2, "dropout": 0.9, "lookback_windows": 1}
    answer = await rig.bus.command("trainer", "train", asked)
    assert answer == {"batch_id": None, "why_not": ["no version has been promoted yet"]}
    await rig.world.deployment("v0", "promoted")
    assert (await rig.bus.command("trainer", "train", asked))["why_not"] == [
        "grpo: 0 of 1 groups",
        "imitation: 0 of 1 groups",
    ]
    await rig.world.exact_groups(1)
    await rig.world.exact_groups(1, prefix="newer", window=3)
    answer = await rig.bus.command("trainer", "train", asked)
    batch = await rig.pool.fetchrow("select * from batches where batch_id = $1", answer["batch_id"])
    assert batch is not None
    assert batch["config"]["recipe"]["steps"] == 2
    rows = await rig.pool.fetch("select group_id, left_out from batch_trajectories")
    assert {row["group_id"] for row in rows} == {"newer0"}
    assert any(row["left_out"] is None for row in rows)
    again = await rig.bus.command("trainer", "train", asked)
    assert again == {"batch_id": None, "why_not": [f"batch {answer['batch_id']} is being trained"]}


async def test_a_trainer_that_is_stopped_loses_nothing(rig: Rig, nats_server: NatsServer, tmp_path: Path) -> None:
    first, second = Held(tmp_path / "first"), Held(tmp_path / "second")
    _, training = rig.start(first)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(3)
    process = await first.began()
    training.cancel()
    await asyncio.gather(training, return_exceptions=True)
    await gone(process)
    other = Bus(nats_server.url, name="other")
    await other.connect()
    rig.start(second, bus=other)
    second.let_go()
    await rig.until("select state = 'trained' from batches")
    row = await rig.pool.fetchrow("select fencing_token, attempts from batches")
    assert tuple(row or ()) == (2, 1), "an orderly stop is no attempt"
    assert first.jobs[0].recipe == second.jobs[0].recipe
    await other.close()


async def test_a_trainer_that_lost_its_lease_leaves_nothing_behind(rig: Rig, tmp_path: Path) -> None:
    """As after kill -9 or a long pause: another has the batch, the first one comes back and is fenced."""
    engine = Held(tmp_path / "engine")
    rig.start(engine, lease_s=0.3)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(3)
    process = await engine.began()
    await rig.pool.execute(
        "update batches set fencing_token = 7, attempts = 2, lease_until = now() + interval '1 hour'"
    )
    await gone(process)
    engine.let_go()
    assert await rig.pool.fetchval("select count(*) from models") == 1
    await rig.pool.execute("update batches set lease_until = now()")
    await rig.until("select state = 'trained' from batches")
    assert await rig.pool.fetchval("select fencing_token from batches") == 8


async def test_a_batch_that_is_cancelled_ends_at_once_and_its_groups_go_back(rig: Rig, tmp_path: Path) -> None:
    engine = Held(tmp_path / "engine")
    rig.start(engine, lease_s=0.6, retry_s=3600.0)
    await rig.bus.broker.start()
    await rig.promoted_base()
    with pytest.raises(GiveUpError, match="no batch of policy default is being trained"):
        await rig.bus.command("trainer", "cancel", {})
    await rig.world.exact_groups(3)
    process = await engine.began()
    [batch_id] = [job.batch_id for job in engine.jobs]
    asked = {"batch_id": batch_id, "by": "ana", "reason": "the wrong rubric"}
    assert await rig.bus.command("trainer", "cancel", asked) == {"cancelled": batch_id}
    await gone(process)
    row = await rig.pool.fetchrow("select state, failure from batches")
    assert tuple(row or ()) == ("cancelled", "cancelled by ana: the wrong rubric")
    row = await rig.pool.fetchrow("select state, reason, ended_at is not null from attempts")
    assert tuple(row or ()) == ("cancelled", "cancelled by ana: the wrong rubric", True)
    await rig.until("select not exists (select from batches where state = 'claimed')")
    assert len(await Store(rig.pool).unused_groups("default", 9)) == 3
    with pytest.raises(GiveUpError, match=f"{batch_id} is cancelled"):
        await rig.bus.command("trainer", "cancel", asked)
    async with asyncio.timeout(20):
        while list(rig.settings.artifacts_dir.glob("jobs/*/*/*")):
            await asyncio.sleep(0.01)


async def test_a_process_that_is_killed_is_a_crash_with_its_signal(rig: Rig, tmp_path: Path) -> None:
    engine = Held(tmp_path / "engine")
    rig.start(engine)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(3)
    os.kill(await engine.began(), signal.SIGKILL)
    await engine.began(2)
    engine.let_go()
    await rig.until("select state = 'trained' from batches")
    rows = await rig.pool.fetch("select number, state, reason from attempts order by fencing_token")
    assert [tuple(row) for row in rows] == [
        (1, "crashed", "its process was killed by signal 9 (SIGKILL), out of memory or by hand"),
        (2, "trained", None),
    ]


async def test_force_trains_beside_a_trial_of_what_is_named(rig: Rig, tmp_path: Path) -> None:
    engine = Held(tmp_path / "engine").let_go()
    rig.start(engine, tick_s=60.0, min_groups=50)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(2)
    await rig.world.exact_groups(1, prefix="newer", window=3)
    asked: dict[str, Any] = {"groups": ["g1", "nothing"]}
    why = "nothing of it is scored for this policy, or a batch holds it already"
    assert (await rig.bus.command("trainer", "train", asked))["why_not"] == [f"group nothing: {why}"]
    assert (await rig.bus.command("trainer", "train", {"groups": ["g0"]}))["batch_id"]
    await rig.until("select exists (select from models where version = 'v1')")
    await rig.world.deployment("v1", "canary")
    assert (await rig.bus.command("trainer", "train", {}))["why_not"] == ["v1 is on trial and undecided"]
    assert (await rig.bus.command("trainer", "train", {"groups": ["g1"], "force": True}))["batch_id"]
    await rig.until("select exists (select from models where version = 'v2')")
    newer = await rig.pool.fetchval("select window_id from groups where group_id = 'newer0'")
    assert (await rig.bus.command("trainer", "train", {"windows": [newer], "force": True}))["batch_id"]
    await rig.until("select exists (select from models where version = 'v3')")
    made = [{episode.group_id for episode in job.episodes} for job in engine.jobs]
    assert made == [{"g0"}, {"g1"}, {"newer0"}]


async def test_what_can_never_be_trained_fails_at_once(rig: Rig) -> None:
    rig.start(Broken(GiveUpError("the template has no marks")))
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(3)
    await rig.until("select state = 'failed' from batches")
    row = await rig.pool.fetchrow("select attempts, failure from batches")
    assert tuple(row or ()) == (1, "the template has no marks")


async def test_what_fails_again_and_again_is_given_up(rig: Rig) -> None:
    rig.start(Broken(OSError("no space left")))
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(3)
    await rig.until("select state = 'failed' from batches")
    row = await rig.pool.fetchrow("select attempts, failure from batches")
    assert tuple(row or ()) == (3, "OSError: no space left; given up after 3 attempts")


async def test_only_the_winners_of_groups_with_spread_are_imitated(rig: Rig) -> None:
    rig.start(TORCH)
    await rig.bus.broker.start()
    await rig.promoted_base()
    for number in range(3):
        calls = [[talk(f"c{number}{n}", "up?", answer)] for n, answer in enumerate(("buy", "sell"))]
        won = [1.0, 0.0] if number % 2 == 0 else [0.0, 1.0]
        await rig.world.group(f"g{number}", list(zip(calls, won, strict=True)), rewards=won)
    await rig.until("select announced_at is not null from models where version = 'v1'")
    rows = await rig.pool.fetch("select trajectory_id, label from batch_trajectories where trained order by 1")
    assert [tuple(row) for row in rows] == [(f"g{n}-{n % 2}", "imitation") for n in range(3)]
    metrics = await rig.pool.fetchval("select metrics from models where version = 'v1'")
    assert metrics["loss_last"] < metrics["loss_first"]


async def test_a_run_that_was_forgotten_is_left_out_and_said(rig: Rig, tmp_path: Path) -> None:
    engine = Held(tmp_path / "engine").let_go()
    parts, _ = rig.start(engine, tick_s=60.0)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(3)
    await parts.readings.sweep()
    assert len(await parts.batches.claim_ready()) == 1
    await rig.pool.execute("update bodies set body = null where trajectory_id = 'g1-0'")
    await parts.trainer.round()
    row = await rig.pool.fetchrow("select trajectory_id, left_out from batch_trajectories where not trained")
    assert tuple(row or ()) == ("g1-0", "its events are no longer stored")
    assert len(engine.jobs[0].episodes) == 5


async def test_nothing_is_claimed_while_a_version_is_undecided(rig: Rig, tmp_path: Path) -> None:
    engine = Held(tmp_path / "engine").let_go()
    parts, _ = rig.start(engine, tick_s=60.0, sabotage_version=1)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(3)
    await parts.trainer.round()
    await rig.world.exact_groups(3, prefix="later")
    await parts.trainer.round()  # v1 has no row of the deployer's yet
    await rig.world.deployment("v1", "canary")
    await parts.trainer.round()
    assert [job.version for job in engine.jobs] == ["v1"]
    assert await rig.pool.fetchval("select note from models where version = 'v1'") is not None
    await rig.world.deployment("v1", "refused")
    await parts.trainer.round()
    assert [(job.version, job.parent_version, job.sabotage) for job in engine.jobs] == [
        ("v1", "v0", True),
        ("v2", "v0", False),
    ]


async def test_untrainable_groups_are_recorded_once(rig: Rig, tmp_path: Path) -> None:
    parts, _ = rig.start(Held(tmp_path / "engine"), tick_s=60.0)
    await rig.bus.broker.start()
    await rig.promoted_base()
    for number in range(3):
        runs = [([call(f"c{number}{n}", [5], [6], [-1.0], version="someone")], float(n)) for n in (0, 1)]
        await rig.world.group(f"g{number}", runs)
    told = await rig.bus.command("trainer", "train", {})
    why = "none of the runs can be trained on: someone is no version of this line (6)"
    assert told == {"batch_id": None, "why_not": [why]}
    assert await rig.pool.fetchval("select state from batches") == "empty"
    rows = await rig.pool.fetch("select distinct trained, label, left_out from batch_trajectories")
    assert [tuple(row) for row in rows] == [(False, "mixed", "someone is no version of this line")]
    await parts.trainer.round()
    assert await rig.pool.fetchval("select count(*) from batches") == 1


async def test_a_base_that_is_no_artifact_is_refused(rig: Rig, tmp_path: Path) -> None:
    rig.start(Held(tmp_path / "engine"), tick_s=60.0)
    await rig.bus.broker.start()
    with pytest.raises(GiveUpError, match="is not in"):
        await rig.bus.command("trainer", "register_base", {"artifact_sha256": "0" * 64})
    sha256 = rig.artifact.sha256
    for _ in range(2):
        assert await rig.bus.command("trainer", "register_base", {"artifact_sha256": sha256}) == {"version": "v0"}


async def test_an_unannounced_version_is_announced_by_the_sweep(rig: Rig, tmp_path: Path) -> None:
    parts, _ = rig.start(Held(tmp_path / "engine"), tick_s=60.0, sweep_s=60.0)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.pool.execute("update models set announced_at = null")  # killed between the announcement and its mark
    await parts.trainer.announce_models()
    assert await rig.pool.fetchval("select announced_at is not null from models")
    assert len(await rig.messages(subjects.MODEL_TRAINED)) == 1


async def test_readiness_reads_no_body(rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts, _ = rig.start(Held(tmp_path / "engine"), tick_s=60.0, sweep_s=60.0, min_groups=50)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(20)
    await rig.world.group("cut", [([cut(n)], float(n)) for n in (0, 1)])
    read: list[int] = []
    real = trajectories.assemble
    monkeypatch.setattr(trajectories, "assemble", lambda *args: read.append(1) or real(*args))  # type: ignore[func-returns-value]  # one line
    before = await rig.bus.command("trainer", "readiness", {})
    assert before["left_out"] == {"it is not read yet": 42}
    assert await parts.readings.sweep() == 42
    assert (len(read), await parts.readings.sweep()) == (42, 0)
    after = await rig.bus.command("trainer", "readiness", {})
    assert after["carried"] == {"exact": 40}
    [reason] = after["left_out"]
    assert "top_p 0.9: send top_p 1" in reason
    assert len(read) == 42


def cut(number: int) -> LlmCall:
    return call(f"cut{number}", [5], [6], [-1.0]).model_copy(update={"sampling": {"top_p": 0.9}})


async def test_one_run_or_policy_that_cannot_be_read_stops_no_other(rig: Rig, tmp_path: Path) -> None:
    """What an agent may publish, and what only a fault of ours can leave: bytes that do not unpack."""
    engine = Held(tmp_path / "engine").let_go()
    parts, _ = rig.start(engine, tick_s=60.0, sweep_s=60.0)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(3)
    odd = [call(f"odd{n}", [5], [6], [-1.0]) for n in range(4)]
    for one, logprobs in zip(odd, ([1], "x", {"content": [{"logprob": 10**400}]}, 7), strict=True):
        assert one.response is not None
        one.response["logprobs"] = logprobs
    await rig.world.group("odd", [([one], n / 3) for n, one in enumerate(odd)])
    await rig.pool.execute("update bodies set body = 'nonsense' where trajectory_id = 'g2-1'")
    other = World(rig.pool, "another")
    await rig.bus.command("trainer", "register_base", {"policy": "another", "artifact_sha256": rig.artifact.sha256})
    await other.deployment("v0", "promoted")
    await other.exact_groups(3, prefix="other")
    await parts.trainer.round()
    trained = await rig.pool.fetch("select policy from batches where state = 'trained' order by policy")
    assert [row["policy"] for row in trained] == ["another", "default"]
    assert len(engine.jobs[0].episodes) + len(engine.jobs[1].episodes) == 11


PAID = {"kind": "openai", "base_url": "https://api.openai.com/v1", "model": "gpt", "credential": "openai"}


async def test_a_student_learns_from_a_paid_model_and_later_versions_from_their_own_tokens(
    rig: Rig, tmp_path: Path
) -> None:
    engine = Held(tmp_path / "engine").let_go()
    parts, _ = rig.start(engine, tick_s=60.0, sweep_s=60.0)
    await rig.bus.broker.start()
    for _ in range(2):
        assert await rig.bus.command("trainer", "register_endpoint", {"serving": PAID}) == {"version": "v0"}
    with pytest.raises(GiveUpError, match=r"v0 is endpoint https://api\.openai\.com/v1 model gpt; name another policy"):
        await rig.bus.command("trainer", "register_endpoint", {"serving": {**PAID, "model": "other"}})
    [told] = await rig.messages(subjects.MODEL_TRAINED)
    assert (told["artifact_sha256"], told["serving"]) == (None, PAID)
    await rig.world.deployment("v0", "promoted")
    paid = [call(f"p{n}", [5], [n], [-1.0], version="v0") for n in range(6)]  # it gives tokens: of its own vocabulary
    for number in range(3):
        won = [1.0, 0.0] if number % 2 == 0 else [0.0, 1.0]
        pair = [([one], score) for one, score in zip(paid[2 * number : 2 * number + 2], won, strict=True)]
        await rig.world.group(f"paid{number}", pair, rewards=won)
    await parts.trainer.round()
    [missing] = (await rig.bus.command("trainer", "readiness", {}))["missing"]
    assert "register a student with `ratchet base register DIR" in missing

    student = {"artifact_sha256": rig.artifact.sha256}
    assert await rig.bus.command("trainer", "register_base", student) == {"student_of": "v0"}
    await parts.trainer.round()
    [job] = engine.jobs
    assert (job.version, job.parent_version, job.method, job.parent.name) == (
        "v1",
        "v0",
        "imitation",
        rig.artifact.sha256,
    )
    assert {episode.trajectory_id for episode in job.episodes} == {"paid0-0", "paid1-1", "paid2-0"}
    assert await rig.pool.fetchval("select student_sha256 from batches") == rig.artifact.sha256

    await rig.world.deployment("v0", "superseded")
    await rig.world.deployment("v1", "promoted")
    await rig.world.exact_groups(3, version="v1", prefix="own")
    await parts.trainer.round()
    assert [(one.version, one.parent_version, one.method) for one in engine.jobs[1:]] == [("v2", "v1", "grpo")]


async def test_a_base_that_is_weights_stays_what_it_is(rig: Rig, tmp_path: Path) -> None:
    rig.start(Held(tmp_path / "engine"), tick_s=60.0)
    await rig.bus.broker.start()
    await rig.bus.command("trainer", "register_base", {"artifact_sha256": rig.artifact.sha256})
    with pytest.raises(GiveUpError, match=f"v0 is artifact {rig.artifact.sha256[:12]}"):
        await rig.bus.command("trainer", "register_endpoint", {"serving": PAID})
    place = {"kind": "inference", "base_url": "http://x/v1"}
    with pytest.raises(GiveUpError, match="of kind openai, got inference"):
        await rig.bus.command("trainer", "register_endpoint", {"serving": place})


async def test_the_lease_is_kept_while_a_large_job_is_written(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, _ = rig.start(Held(tmp_path / "engine").let_go(), tick_s=60.0, lease_s=0.9)
    await rig.bus.broker.start()
    await rig.promoted_base()
    await rig.world.exact_groups(3)
    write = parts.jobs.write

    async def slowly(lease: Lease) -> Any:
        until = "select lease_until from batches"
        first = await rig.pool.fetchval(until)
        async with asyncio.timeout(10):
            while await rig.pool.fetchval(until) == first:
                await asyncio.sleep(0.01)
        return await write(lease)

    monkeypatch.setattr(parts.jobs, "write", slowly)
    await parts.trainer.round()
    assert await rig.pool.fetchval("select state from batches") == "trained"

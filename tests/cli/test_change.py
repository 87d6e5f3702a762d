"""Commands that change something: what the owning service is asked, and how its answer is shown."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from services.trainer.base import create_corpus_base
from shared.artifacts import DirectoryStore
from shared.bus import Bus
from shared.database import Pool
from shared.errors import GiveUpError
from tests.cli.conftest import Ratchet

pytestmark = pytest.mark.usefixtures("servers")


class Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


async def answering(bus: Bus, service: str, verb: str, reply: dict[str, Any] | str) -> list[dict[str, Any]]:
    """The requests that arrive at a service that always gives this reply; a text is a refusal."""
    arrived: list[dict[str, Any]] = []

    async def handler(request: Anything) -> dict[str, Any]:
        arrived.append(request.model_dump())
        if isinstance(reply, str):
            raise GiveUpError(reply)
        return reply

    bus.on_command(service, verb, Anything, handler)
    await bus.broker.start()
    return arrived


async def _soon(reply: dict[str, Any]) -> dict[str, Any]:
    return reply


async def test_train(ratchet: Ratchet, bus: Bus) -> None:
    arrived = await answering(bus, "trainer", "train", {"batch_id": "b7"})
    said = await ratchet(
        "train", "--min-agents", "3", "--iterations", "5", "--dropout", "0.2", "--lookback", "4", "--json"
    )
    assert said.json == {"batch_id": "b7"}
    assert arrived == [{"policy": "default", "min_agents": 3, "iterations": 5, "dropout": 0.2, "lookback_windows": 4}]
    assert (await ratchet("train", "-p", "posters")).out == "batch id: b7\n"
    assert arrived[1] == {"policy": "posters"}


async def test_train_that_finds_too_little_says_what_is_missing(ratchet: Ratchet, bus: Bus) -> None:
    await answering(bus, "trainer", "train", {"batch_id": None, "why_not": ["3 of 8 groups", "1 of 2 agents"]})
    said = await ratchet("train")
    assert (said.code, said.out) == (1, "batch id: -\nwhy not: 3 of 8 groups; 1 of 2 agents\n")


async def test_train_that_makes_no_batch_says_why_runs_carry_nothing(ratchet: Ratchet, bus: Bus) -> None:
    left_out = {"no tokens": 3, "it has no reward of record": 1}
    ready = {"ready": False, "missing": ["grpo: 0 of 8 groups"], "left_out": left_out}
    bus.on_command("trainer", "readiness", Anything, lambda _: _soon(ready))
    await answering(bus, "trainer", "train", {"batch_id": None, "why_not": ["grpo: 0 of 8 groups"]})
    assert (await ratchet("train")).out.splitlines()[1:] == [
        "why not: grpo: 0 of 8 groups",
        "left out: no tokens (3); it has no reward of record (1)",
    ]
    assert (await ratchet("train", "--json")).json["left_out"] == left_out


async def test_rescore_asks_the_scorer(ratchet: Ratchet, bus: Bus) -> None:
    arrived = await answering(bus, "scorer", "rescore", {"window_id": "w", "groups": 2})
    said = await ratchet("rescore", "2026-11-20T10:00", "--judge", "ruler", "--rubric", "art-default/1", "--json")
    assert said.json == {"window_id": "w", "groups": 2}
    assert arrived == [{"window_id": "2026-11-20T10:00", "judge": "ruler", "rubric": "art-default/1"}]
    assert (await ratchet("rescore", "w")).out == "window id: w\ngroups: 2\n"
    wrong = await ratchet("rescore", "w", "--judge", "me")
    assert (wrong.code, wrong.err) == (2, "ratchet: --judge 'me' is not known; choose outcome or ruler\n")


async def test_rescore_waits_until_each_group_is_judged_or_failed(ratchet: Ratchet, bus: Bus, pool: Pool) -> None:
    await answering(bus, "scorer", "rescore", {"window_id": "w", "groups": 2})
    await pool.execute("insert into windows values ('w', now(), now() + interval '1 hour', 3600, 'closed')")
    for group, state, failure in (("g1", "scored", None), ("g2", "scored", "it said 7"), ("g3", "small", None)):
        await pool.execute(
            """insert into groups (group_id, policy, window_id, scenario_id, homogeneous, state, revision, failure,
                                   wanted_revision)
               values ($1, 'default', 'w', $1, true, $2, 1, $3, 2)""",
            group,
            state,
            failure,
        )
    waiting = asyncio.create_task(ratchet("rescore", "w", "--wait", "--json"))
    async with asyncio.timeout(20):
        while not await pool.fetchval("select exists (select from pg_stat_activity where query like '%not wanted%')"):
            await asyncio.sleep(0.01)
        await pool.execute("update groups set revision = 2 where group_id = 'g1'")
        said = await waiting
    assert (said.code, said.json) == (1, {"window_id": "w", "groups": 2, "judged": 1, "failed": 1})


async def test_deploy_asks_the_deployer(ratchet: Ratchet, bus: Bus) -> None:
    deployed = await answering(bus, "deployer", "deploy", {"version": "v2", "state": "promoted"})
    said = await ratchet("deploy", "default", "v2", "--reason", "looked at it")
    assert said.out == "version: v2\nstate: promoted\n"
    assert deployed == [{"policy": "default", "version": "v2", "reason": "looked at it"}]


async def test_rollback(ratchet: Ratchet, bus: Bus) -> None:
    back = await answering(bus, "deployer", "rollback", {"back_to": "v0"})
    assert (await ratchet("rollback", "default", "--json")).json == {"back_to": "v0"}
    assert (await ratchet("rollback", "default", "v2")).code == 0
    assert back == [{"policy": "default"}, {"policy": "default", "version": "v2"}]


async def test_a_refusal_is_shown_as_it_was_said(ratchet: Ratchet, bus: Bus) -> None:
    await answering(bus, "deployer", "deploy", "there is no v9; `ratchet models` lists them")
    said = await ratchet("deploy", "default", "v9")
    assert (said.code, said.err) == (2, "ratchet: there is no v9; `ratchet models` lists them\n")


async def test_a_service_that_is_away_is_a_reason_to_try_later(ratchet: Ratchet) -> None:
    said = await ratchet("train")
    assert said.code == 75
    assert "no trainer is running" in said.err


async def test_base_register_keeps_the_artifact(ratchet: Ratchet, bus: Bus, tmp_path: Path) -> None:
    arrived = await answering(bus, "trainer", "register_base", {"version": "v0"})
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    lacking = await ratchet("base", "register", str(model))
    assert lacking.code == 2
    assert "no *.safetensors" in lacking.err
    (model / "model.safetensors").write_bytes(b"weights")
    wordless = await ratchet("base", "register", str(model))
    assert wordless.code == 2
    assert "no tokenizer" in wordless.err
    create_corpus_base([[{"role": "user", "content": "Fly me."}]], model, 0, vocabulary=300, width=32)
    said = (await ratchet("base", "register", "model", "--policy", "posters", "--json")).json  # a relative path

    [request] = arrived
    assert request == {"policy": "posters", "artifact_sha256": said["artifact_sha256"], "note": "registered from model"}
    kept = DirectoryStore(tmp_path / ".ratchet/artifacts").open(request["artifact_sha256"])
    assert (kept / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert said["version"] == "v0"
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = (await ratchet("base", "register", "./model/")).out
    assert "chat template: tools are refused" in words


async def test_base_create_learns_from_a_corpus(ratchet: Ratchet, bus: Bus, tmp_path: Path) -> None:
    arrived = await answering(bus, "trainer", "register_base", {"version": "v0"})
    row = {
        "task_id": 1,
        "messages": [{"role": "user", "content": "Fly me."}, {"role": "assistant", "content": "Where to?"}],
    }
    corpus = tmp_path / "corpus.jsonl.gz"
    corpus.write_bytes(gzip.compress((json.dumps(row) + "\n").encode() * 3))
    said = await ratchet("base", "create", "--corpus", str(corpus), "--json")
    assert said.code == 0, said.err
    kept = DirectoryStore(tmp_path / ".ratchet/artifacts").open(arrived[0]["artifact_sha256"])
    assert {"config.json", "tokenizer.json"} <= {path.name for path in kept.iterdir()}

    corpus.write_bytes(gzip.compress(b'{"task_id": 1}\n'))
    bad = await ratchet("base", "create", "--corpus", str(corpus))
    assert bad.code == 2
    assert "line 1: messages must be a list" in bad.err

"""Runs as ART's own objects, and a batch through ART's own model and logs with a backend that trains nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from services.trainer.domain import CallRecord
from services.trainer.engines.engine_art import PLACE, ArtEngine, trajectory_groups
from services.trainer.training import Episode, Job, Recipe
from shared.errors import GiveUpError

art = pytest.importorskip("art", reason="openpipe-art is not installed here; pip install 'ratchet[art]'")

RECIPE = Recipe(1e-5, 1, 64, 0.2, 1.0, 1000, 1)
TOOL = {"type": "function", "function": {"name": "buy", "parameters": {}}}


def call(reply: dict[str, Any], *messages: dict[str, Any]) -> CallRecord:
    return CallRecord(
        list(messages),
        {"message": {"role": "assistant", **reply}, "finish_reason": "stop", "index": 0},
        [TOOL],
        [1, 2, 3],
        [7, 8],
        [-0.1, -0.2],
    )


def episode(agent: str, advantage: float, group: str = "g") -> Episode:
    user = {"role": "user", "content": "up?"}
    tool_call = {"id": "1", "type": "function", "function": {"name": "buy", "arguments": "{}"}}
    first = call({"content": None, "tool_calls": [tool_call]}, user)
    second = call(
        {"content": "done"},
        user,
        (first.response or {})["message"],
        {"role": "tool", "content": "ok", "tool_call_id": "1"},
    )
    return Episode(agent, "run", group, "exact", advantage, 0.5 + advantage / 2, (first, second))


def test_runs_are_arts_own_trajectories() -> None:
    [group, other] = trajectory_groups([episode("b", -1.0), episode("c", 0.5, "h"), episode("a", 1.0)])
    assert (len(group), len(other), group.metadata) == (2, 1, {"group_id": "g"})
    run = group.trajectories[0]
    assert (run.reward, run.metadata["agent_id"], run.tools) == (1.0, "a", [TOOL])
    kinds = [type(item).__name__ for item in run.messages_and_choices]
    assert kinds == ["dict", "Choice", "dict", "Choice"]
    chosen = run.messages_and_choices[1]
    assert chosen.message.tool_calls[0].function.name == "buy"
    assert [(entry.token, entry.logprob) for entry in chosen.logprobs.content] == [
        ("token_id:7", -0.1),
        ("token_id:8", -0.2),
    ]
    assert run.additional_histories == []


@dataclass
class Backend:
    """What ART asks of a backend, without a trainer behind it."""

    steps: dict[str, int] = field(default_factory=dict)
    forks: list[tuple[str, str, int]] = field(default_factory=list)
    trained: list[tuple[str, list[Any], dict[str, Any]]] = field(default_factory=list)
    closed: int = 0

    async def register(self, model: Any) -> None:
        self.steps.setdefault(model.name, 0)

    async def close(self) -> None:
        self.closed += 1

    async def _get_step(self, model: Any) -> int:
        return self.steps[model.name]

    async def _prepare_backend_for_training(self, model: Any, config: Any) -> tuple[str, str]:
        return "http://127.0.0.1:1/v1", "none"

    async def train(self, model: Any, groups: list[Any], **options: Any) -> Any:
        self.trained.append((model.name, groups, options))
        self.steps[model.name] += 1
        return art.TrainResult(step=self.steps[model.name], metrics={"loss/train": 0.25})

    async def _train_sft(self, model: Any, trajectories: Any, *_: Any) -> Any:
        self.trained.append((model.name, list(trajectories), {}))
        self.steps[model.name] += 1
        yield {"loss/train": 1.0}

    async def _experimental_fork_checkpoint(
        self, model: Any, from_model: str, from_project: str, not_after_step: int
    ) -> None:
        self.forks.append((model.name, from_model, not_after_step))

    async def _experimental_pull_model_checkpoint(self, model: Any, step: int, local_path: str) -> str:
        (Path(local_path) / "adapter_model.safetensors").write_text(f"{model.name}:{step}")
        return local_path


def quiet(step: int, steps: int, metrics: Mapping[str, float]) -> None:
    pass


def test_each_version_is_forked_from_its_parent(tmp_path: Path) -> None:
    backend = Backend()
    engine = ArtEngine(lambda: backend, project="market", base_model="some/base")
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    for directory in (base, first, second):
        directory.mkdir()
    job = Job("b1", "traders", "v1", "v0", "grpo", base, (episode("a", 1.0), episode("b", -1.0)), RECIPE)
    trained = engine.train(job, first, quiet)
    assert trained.metrics["loss/train"] == 0.25
    [(name, groups, options)] = backend.trained
    assert (name, options) == ("traders-v1", {"learning_rate": 1e-5, "scale_rewards": False})
    assert [trajectory.reward for trajectory in groups[0]] == [1.0, -1.0]
    assert json.loads((first / PLACE).read_text()) == {
        "base_model": "some/base",
        "name": "traders-v1",
        "project": "market",
        "step": 1,
    }
    engine.train(replace(job, version="v2", parent_version="v1", parent=first, method="imitation"), second, quiet)
    assert backend.forks == [("traders-v2", "traders-v1", 1)]
    assert len(backend.trained[1][1]) == 2
    assert backend.closed == 2


def test_what_art_would_train_wrongly_is_refused(tmp_path: Path) -> None:
    engine = ArtEngine(Backend, project="market", base_model="some/base")
    job = Job("b1", "traders", "v1", "v0", "grpo", tmp_path, (episode("a", 1.0), episode("b", 1.0)), RECIPE)
    with pytest.raises(GiveUpError, match="no group of batch b1 has spread"):
        engine.train(job, tmp_path, quiet)
    with pytest.raises(GiveUpError, match="torch engine"):
        engine.train(replace(job, sabotage=True), tmp_path, quiet)
    (tmp_path / PLACE).write_text(json.dumps({"base_model": "another", "name": "n", "project": "p", "step": 1}))
    with pytest.raises(GiveUpError, match="RATCHET_ART_BASE_MODEL"):
        engine.train(job, tmp_path, quiet)

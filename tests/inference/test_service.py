"""Batching and the checkpoints in memory, on real models."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.domain import Answer, Ask, Refused, Reply, Sampling
from services.inference.engine_torch import TorchModel
from services.inference.service import Inference
from services.inference.settings import InferenceSettings
from shared.artifacts import DirectoryStore
from shared.errors import GiveUpError
from tests.inference.conftest import Checkpoints


def ask(text: str, **sampling: Any) -> Ask:
    return Ask([{"role": "user", "content": text}], None, Sampling(**{"max_tokens": 1, **sampling}))


def model_of(checkpoints: Checkpoints) -> TorchModel:
    return TorchModel(checkpoints.directory, device="cpu", batch_max=64, batch_tokens=10_000, max_tokens=16)


def test_a_batch_answers_as_each_would_alone(checkpoints: Checkpoints) -> None:
    model = model_of(checkpoints)
    asks = [ask("buy " * n, seed=n, max_tokens=1 + n % 5, temperature=n % 3 / 2) for n in range(1, 12)]
    together, alone = model.answer(asks), [model.answer([one])[0] for one in asks]
    for batched, single in zip(together, alone, strict=True):
        assert isinstance(batched, Reply)
        assert isinstance(single, Reply)
        assert batched.token_ids == single.token_ids
        torch.testing.assert_close(torch.tensor(batched.logprobs), torch.tensor(single.logprobs), atol=1e-4, rtol=0)


def test_a_refused_request_takes_no_neighbour_along(checkpoints: Checkpoints) -> None:
    model = model_of(checkpoints)
    model.context_length = 40
    answers = model.answer([ask("up"), ask("up " * 100), ask("down")])
    assert [type(answer) for answer in answers] == [Reply, Refused, Reply]


def test_broken_weights_are_said_and_not_sampled(checkpoints: Checkpoints) -> None:
    model = model_of(checkpoints)
    with torch.no_grad():
        model.model.lm_head.weight.fill_(float("nan"))
    [answer] = model.answer([ask("up")])
    assert isinstance(answer, Refused)
    assert answer.code == "model_broken"


async def test_64_at_once_are_one_or_two_forward_passes(checkpoints: Checkpoints) -> None:
    models: list[TorchModel] = []

    def load(directory: Path) -> TorchModel:
        models.append(model_of(checkpoints))
        return models[-1]

    service = Inference(DirectoryStore(checkpoints.root), load, max_loaded=2, batch_max=64, batch_wait_s=0.003)
    answers = await asyncio.gather(*(service.answer(checkpoints.sha, ask("buy " * n)) for n in range(1, 65)))
    await service.close()
    [model] = models  # loaded once, though 64 asked for it at once
    assert all(isinstance(answer, Reply) for answer in answers)
    assert model.forward_passes <= 2


async def test_the_least_recently_asked_leaves(service: Inference, checkpoints: Checkpoints) -> None:
    a, b, c = checkpoints.shas
    for sha in (a, b, a, c):
        await service.answer(sha, ask("up"))
    assert service.loaded() == [a, c]
    assert isinstance(await service.answer(b, ask("up")), Reply)
    assert service.loaded() == [c, b]


async def test_several_versions_answer_at_once(service: Inference, checkpoints: Checkpoints) -> None:
    """Three versions with room for two: every request is answered, and by the version that it asked for."""

    async def one(number: int) -> Answer:
        return await service.answer(checkpoints.shas[number % 3], ask("up", seed=1, max_tokens=3))

    answers = await asyncio.gather(*(one(n) for n in range(30)))
    replies = [
        tuple(round(logprob, 4) for logprob in answer.logprobs) for answer in answers if isinstance(answer, Reply)
    ]
    assert len(replies) == 30
    assert [replies[n] for n in range(30)] == [replies[n % 3] for n in range(30)]
    assert len(set(replies)) == 3


async def test_a_changed_artifact_is_refused(tmp_path: Path, checkpoints: Checkpoints) -> None:
    import shutil

    from services.inference.app import inference

    shutil.copytree(checkpoints.directory, tmp_path / checkpoints.sha)
    (tmp_path / checkpoints.sha / "README.md").write_text("changed")
    service = inference(InferenceSettings(artifacts_dir=tmp_path, device="cpu"))
    with pytest.raises(GiveUpError, match="was changed"):
        await service.answer(checkpoints.sha, ask("up"))
    (tmp_path / checkpoints.sha / "README.md").write_bytes((checkpoints.directory / "README.md").read_bytes())
    assert isinstance(await service.answer(checkpoints.sha, ask("up")), Reply)  # a failure is not remembered
    await service.close()

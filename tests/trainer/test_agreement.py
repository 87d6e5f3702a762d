"""What inference says it drew from is what the trainer computes again, at any temperature: a run of it is exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.inference.domain import Ask, Reply, Sampling
from services.inference.engine_torch import TorchModel
from services.trainer.domain import CallRecord
from services.trainer.engines.engine_torch import TorchEngine
from tests.trainer.test_engine import episode, job, quiet

CHAT = [{"role": "user", "content": "buy or sell?"}]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_inference_and_trainer_agree_on_the_probability_of_a_reply(
    base: Path, tmp_path: Path, temperature: float
) -> None:
    model = TorchModel(base, device="cpu", batch_max=8, batch_tokens=10_000, max_tokens=24)
    [said] = model.answer([Ask(CHAT, sampling=Sampling(temperature=temperature, seed=4))])
    assert isinstance(said, Reply)
    drawn = CallRecord(
        CHAT,
        {"message": {"role": "assistant"}},
        prompt_token_ids=said.prompt_token_ids,
        token_ids=said.token_ids,
        logprobs=said.logprobs,
        temperature=temperature,
    )
    trained = TorchEngine(device="cpu").train(
        job(base, episode("a", 1.0, drawn, label="stale"), steps=1), tmp_path, quiet
    )
    assert trained.weights == {("a", "run"): pytest.approx(1, abs=1e-4)}  # the ratio of the trainer's to what was said

"""The torch engine on a real, tiny model: what was better gets more probable, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.trainer.domain import CallRecord, Label, Method
from services.trainer.engines.engine_torch import TorchEngine
from services.trainer.learning import checkpoint
from services.trainer.learning.sequences import Conversation
from services.trainer.recipes import learning_rate
from services.trainer.training import Episode, Job, NothingToTrainError, Recipe, TrainingStoppedError
from shared.errors import GiveUpError
from tests.trainer.test_checkpoint import own_words

RECIPE = Recipe(learning_rate=3e-3, steps=4, minibatch=64, clip_epsilon=0.2, max_grad_norm=1.0, micro_tokens=40, seed=1)
PROMPT, GOOD, BAD = [5, 6, 7, 8], [20, 21], [30]


def quiet(step: int, steps: int, metrics: Mapping[str, float]) -> None:
    pass


def logprobs(directory: Path, prompt: list[int], reply: list[int]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    found: list[float] = logits.log_softmax(-1).gather(-1, torch.tensor(reply)[:, None])[:, 0].tolist()
    return found


def exact(base: Path, prompt: list[int], reply: list[int], shift: float = 0.0) -> CallRecord:
    recorded = [value + shift for value in logprobs(base, prompt, reply)]
    return CallRecord(
        [], {"message": {"role": "assistant"}}, prompt_token_ids=prompt, token_ids=reply, logprobs=recorded
    )


def episode(agent: str, advantage: float, *calls: CallRecord, label: Label = "exact") -> Episode:
    return Episode(agent, "run", "g", label, advantage, 1.0, calls)


def job(base: Path, *episodes: Episode, method: Method = "grpo", **recipe: Any) -> Job:
    return Job("batch-1", "default", "v1", "v0", method, base, episodes, replace(RECIPE, **recipe))


def test_the_better_reply_gets_more_probable(base: Path, tmp_path: Path) -> None:
    wanted = job(
        base,
        episode("a", 1.0, exact(base, PROMPT, GOOD)),
        episode("b", -1.0, exact(base, PROMPT, BAD)),
        episode("c", 0.0, exact(base, [9] * 30, [40])),
    )
    steps: list[tuple[int, Mapping[str, float]]] = []
    trained = TorchEngine(device="cpu").train(
        wanted, tmp_path, lambda step, _, metrics: steps.append((step, metrics)) if metrics else None
    )
    assert sum(logprobs(tmp_path, PROMPT, GOOD)) > sum(logprobs(base, PROMPT, GOOD)) + 0.2
    assert sum(logprobs(tmp_path, PROMPT, BAD)) < sum(logprobs(base, PROMPT, BAD)) - 0.1
    curve = trained.metrics["curve"]
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    assert curve[0]["ratio"] == pytest.approx(1, abs=1e-3)  # the recorded logprobs are the parent's own
    assert curve[0]["loss"] == pytest.approx(-(2 - 1 + 0) / 4, abs=1e-3)  # mean over four tokens of -A
    card = (tmp_path / "README.md").read_text()
    assert "batch-1" in card
    assert "3 runs" in card
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes()


def test_the_same_batch_gives_the_same_weights(base: Path, tmp_path: Path) -> None:
    episodes = [episode(str(n), n - 2.0, exact(base, PROMPT, [20 + n])) for n in range(5)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        TorchEngine(device="cpu").train(job(base, *episodes, minibatch=2), tmp_path / name, quiet)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1] != (base / "model.safetensors").read_bytes()


def test_a_batch_ends_before_the_step_that_goes_too_far(base: Path, tmp_path: Path) -> None:
    episodes = (episode("a", 1.0, exact(base, PROMPT, GOOD)), episode("b", -1.0, exact(base, PROMPT, BAD)))
    trained = TorchEngine(device="cpu").train(job(base, *episodes, steps=9, stop_kl=0.05), tmp_path, quiet)
    curve = trained.metrics["curve"]
    assert 1 <= len(curve) < 9
    assert all(point["kl"] <= 0.05 for point in curve)
    assert "over stop_kl 0.05" in trained.metrics["stopped_early"]
    assert trained.metrics["learning_rate"] == RECIPE.learning_rate


def test_without_a_rate_it_is_that_of_the_models_size(base: Path, tmp_path: Path) -> None:
    runs = (episode("a", 1.0, exact(base, PROMPT, GOOD)), episode("b", -1.0, exact(base, PROMPT, BAD)))
    trained = TorchEngine(device="cpu").train(job(base, *runs, steps=1, learning_rate=None), tmp_path, quiet)
    weights = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert trained.metrics["learning_rate"] == learning_rate("full", weights)
    assert trained.metrics["curve"][0]["kl"] == pytest.approx(0, abs=1e-5)


def test_a_stale_sequence_too_far_from_the_parent_is_masked(base: Path, tmp_path: Path) -> None:
    wanted = job(
        base,
        episode("near", 1.0, exact(base, PROMPT, GOOD, shift=-0.1), label="stale"),
        episode("far", -1.0, exact(base, PROMPT, BAD, shift=-3.0), label="stale"),
        importance="sequence_mask",
        steps=1,
    )
    trained = TorchEngine(device="cpu").train(wanted, tmp_path, quiet)
    assert trained.weights[("near", "run")] == pytest.approx(np.exp(0.2), rel=1e-3)
    assert trained.weights[("far", "run")] == 0.0
    assert trained.metrics["curve"][0]["masked"] == pytest.approx(1 / 3)


def test_stale_runs_are_weighed_by_the_truncated_ratio(base: Path, tmp_path: Path) -> None:
    wanted = job(
        base,
        episode("half", 1.0, exact(base, PROMPT, GOOD, shift=0.6931472), label="stale"),
        episode("capped", -1.0, exact(base, PROMPT, BAD, shift=-3.0), label="stale"),
        steps=1,
    )
    trained = TorchEngine(device="cpu").train(wanted, tmp_path, quiet)
    assert trained.weights == {("half", "run"): pytest.approx(0.5, abs=1e-3), ("capped", "run"): 2.0}
    assert trained.metrics["curve"][0]["loss"] == pytest.approx(-(2 * 0.5 - 2) / 3, abs=1e-3)


def words(*turns: str) -> CallRecord:
    roles = ["user" if n % 2 == 0 else "assistant" for n in range(len(turns))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return CallRecord(messages[:-1], {"message": messages[-1]})


def test_imitation_learns_the_assistants_words(base: Path, tmp_path: Path) -> None:
    episodes = [episode("a", 1.0, words("up?", "buy"), words("up?", "buy", "down?", "sell now"), label="imitation")]
    trained = TorchEngine(device="cpu").train(job(base, *episodes, method="imitation", steps=6), tmp_path, quiet)
    assert trained.metrics["sequences"] == 1
    assert trained.metrics["loss_last"] < trained.metrics["loss_first"] - 0.3


def test_only_the_agents_own_words_carry_loss(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = (
        {"role": "user", "content": "up?"},
        {"role": "assistant", "content": "an example"},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": " sell\n", "tool_calls": None},
    )
    found = checkpoint.render(tokenizer, Conversation(messages, frozenset({3}), None))
    assert own_words(tokenizer, found) == " sell\n<|im_end|>"


def test_a_sabotaged_version_is_worse(base: Path, tmp_path: Path) -> None:
    wanted = job(
        base,
        episode("a", 1.0, words("up?", "buy"), label="imitation"),
        method="imitation",
        steps=12,
        learning_rate=1e-2,
    )
    prompt = AutoTokenizer.from_pretrained(base).apply_chat_template(
        [{"role": "user", "content": "up?"}], add_generation_prompt=True, return_dict=False
    )
    reply = AutoTokenizer.from_pretrained(base)("buy<|im_end|>", add_special_tokens=False)["input_ids"]
    said = {}
    for name, sabotage in (("good", False), ("bad", True)):
        (tmp_path / name).mkdir()
        TorchEngine(device="cpu").train(replace(wanted, sabotage=sabotage), tmp_path / name, quiet)
        said[name] = sum(logprobs(tmp_path / name, prompt, reply))
    assert said["bad"] < said["good"] - 1
    assert "fire drill" in (tmp_path / "bad" / "README.md").read_text()


def test_what_cannot_go_through_the_model_is_said(base: Path, tmp_path: Path) -> None:
    long = replace(exact(base, PROMPT, BAD), prompt_token_ids=[5] * 70_000)
    fits = exact(base, PROMPT, GOOD)
    engine = TorchEngine(device="cpu")
    trained = engine.train(job(base, episode("a", 1.0, fits), episode("b", -1.0, long), steps=1), tmp_path, quiet)
    assert trained.skipped == {("b", "run"): "its 70001 tokens are over the model's context of 65536"}
    with pytest.raises(NothingToTrainError, match="context of 65536") as refused:
        engine.train(job(base, episode("b", -1.0, long)), tmp_path, quiet)
    assert refused.value.skipped.keys() == {("b", "run")}


CULPRITS: dict[str, tuple[float, Any, str]] = {
    "over the vocabulary": (1.0, lambda call: replace(call, prompt_token_ids=[999]), "999 is outside the parent's"),
    "negative": (1.0, lambda call: replace(call, token_ids=[20, -1]), "-1 is outside the parent's vocabulary"),
    "gradient is NaN": (1.0, lambda call: replace(call, logprobs=[-100.0] * 2), "its gradient is not finite"),
    "loss is infinite": (-1.0, lambda call: replace(call, logprobs=[-200.0] * 2), "its gradient is not finite"),
    "no token of its own": (1.0, lambda call: replace(call, response=None), "no token of it is the agent's own"),
}


@pytest.mark.parametrize("name", CULPRITS)
@pytest.mark.parametrize("minibatch", [64, 1])
def test_the_culprit_alone_is_left_out_with_its_reason(base: Path, tmp_path: Path, name: str, minibatch: int) -> None:
    advantage, spoil, reason = CULPRITS[name]
    good = [episode("a", 1.0, exact(base, PROMPT, GOOD)), episode("b", -1.0, exact(base, PROMPT, BAD))]
    culprit = episode("c", advantage, spoil(exact(base, PROMPT, GOOD)))
    trained = TorchEngine(device="cpu").train(job(base, *good, culprit, minibatch=minibatch), tmp_path, quiet)
    assert trained.skipped.keys() == {("c", "run")}
    assert reason in trained.skipped["c", "run"]
    assert trained.metrics["sequences"] == 2
    if minibatch == 64:
        (tmp_path / "without").mkdir()
        without = TorchEngine(device="cpu").train(job(base, *good), tmp_path / "without", quiet)
        losses = [[point["loss"] for point in one.metrics["curve"]] for one in (trained, without)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5), "the others are trained on as if it were not there"
    with pytest.raises(NothingToTrainError, match=reason.replace("'", ".")):
        TorchEngine(device="cpu").train(job(base, culprit), tmp_path, quiet)


def test_a_conversation_that_no_template_takes_is_left_out_alone(base: Path, tmp_path: Path) -> None:
    odd = CallRecord([{"role": "assistant", "tool_calls": [5]}], {"message": {"role": "assistant", "content": "buy"}})
    episodes = [episode("a", 1.0, words("up?", "buy")), episode("b", 1.0, odd)]
    trained = TorchEngine(device="cpu").train(job(base, *episodes, method="imitation"), tmp_path, quiet)
    assert trained.skipped.keys() == {("b", "run")}


def test_too_high_a_learning_rate_blames_no_run(base: Path, tmp_path: Path) -> None:
    episodes = [episode(str(n), n - 1.5, exact(base, PROMPT, [20 + n])) for n in range(4)]
    for minibatch in (1, 64):
        with pytest.raises(GiveUpError, match="lower the learning rate"):
            TorchEngine(device="cpu").train(
                job(base, *episodes, learning_rate=1e30, minibatch=minibatch), tmp_path, quiet
            )


def test_a_run_at_another_temperature_is_trained_at_it(base: Path, tmp_path: Path) -> None:
    """Whether a server records the logprobs of the tempered distribution (ours) or of the raw one (vLLM)."""
    for temperature in (0.5, 2.0):
        call = replace(exact(base, PROMPT, GOOD), temperature=temperature)
        trained = TorchEngine(device="cpu").train(job(base, episode("a", 1.0, call), steps=1), tmp_path, quiet)
        [point] = trained.metrics["curve"]
        assert point["ratio"] == pytest.approx(1, abs=1e-4)
        assert point["grad_norm"] == pytest.approx(reference_norm(base, temperature), rel=1e-3)


def reference_norm(base: Path, temperature: float) -> float:
    """Length of the gradient of - 1/T sum_t log softmax(logits / temperature)[token], written out."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    logits = model(torch.tensor([PROMPT + GOOD])).logits[0, len(PROMPT) - 1 : -1]
    loss = -(logits / temperature).log_softmax(-1).gather(-1, torch.tensor(GOOD)[:, None]).mean()
    loss.backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def test_training_stops_when_it_is_told(base: Path, tmp_path: Path) -> None:
    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        raise TrainingStoppedError

    with pytest.raises(TrainingStoppedError):
        TorchEngine(device="cpu").train(job(base, episode("a", 1.0, exact(base, PROMPT, GOOD))), tmp_path, stop)
    assert list(tmp_path.iterdir()) == []

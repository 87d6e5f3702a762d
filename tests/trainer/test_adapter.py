"""LoRA on a real, tiny model: the adapter alone learns, is kept as peft has it, and goes on where it stood."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.trainer.engines.engine_torch import TorchEngine
from services.trainer.learning import adapter, checkpoint, precision
from services.trainer.training import Job
from shared.artifacts import DirectoryStore, adapter_of, base_of, describe
from shared.errors import GiveUpError
from tests.trainer.test_engine import BAD, GOOD, PROMPT, episode, exact, quiet, words
from tests.trainer.test_engine import job as whole_job

IDS = torch.tensor([PROMPT + GOOD + BAD])


def lora(base: Path, **recipe: Any) -> Job:
    """A batch that two exact runs make, trained as an adapter."""
    runs = (episode("a", 1.0, exact(base, PROMPT, GOOD)), episode("b", -1.0, exact(base, PROMPT, BAD)))
    return whole_job(base, *runs, **{"trains": "lora", "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2} | recipe)


def trained(job: Job, directory: Path) -> Path:
    directory.mkdir()
    TorchEngine(device="cpu").train(job, directory, quiet)
    return directory


def logprobs(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits.log_softmax(-1)
    return found


def served(base: Path, directory: Path) -> torch.Tensor:
    """By peft alone, as whoever serves it reads it."""
    from peft import PeftModel

    return logprobs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory))


def test_a_gradient_step_changes_the_adapter_alone(base: Path, tmp_path: Path) -> None:
    job = lora(base)
    model, _ = checkpoint.load(job, "cpu")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert torch.equal(logprobs(model), logprobs(AutoModelForCausalLM.from_pretrained(base))), "B begins at zero"
    from services.trainer.learning.likelihood import Likelihood
    from services.trainer.learning.loop import Loop
    from services.trainer.learning.parts import Parts
    from services.trainer.learning.samples import Samples

    parts = Parts(Likelihood(model), micro_tokens=40)
    samples = Samples(job, vocabulary=300, context=1000)
    Loop(job, model, parts, samples, quiet).run(samples.read(None, parts.logprobs))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_what_is_saved_is_what_was_trained(base: Path, tmp_path: Path) -> None:
    home = trained(lora(base), tmp_path / "v1")
    assert {path.name for path in home.iterdir()} >= {adapter.CONFIG, adapter.WEIGHTS, "tokenizer.json", "README.md"}
    assert not {"config.json", "model.safetensors"} & {path.name for path in home.iterdir()}
    assert adapter_of(home) == describe(base).sha256
    after = served(base, home)
    loaded, _ = checkpoint.load(replace(lora(base), parent=home, base=base), "cpu")
    assert torch.allclose(logprobs(loaded), after, atol=1e-6)
    assert torch.allclose(logprobs(adapter.merge(loaded)), after, atol=1e-5)
    assert after[0, 3, GOOD[0]] > logprobs(AutoModelForCausalLM.from_pretrained(base))[0, 3, GOOD[0]] + 0.1


def test_the_same_batch_gives_the_same_artifact(base: Path, tmp_path: Path) -> None:
    homes = [trained(lora(base), tmp_path / name) for name in ("one", "two")]
    torch.manual_seed(5)
    assert describe(homes[0]).sha256 == describe(homes[1]).sha256
    assert describe(homes[0]).sha256 != describe(trained(lora(base, seed=2), tmp_path / "three")).sha256


def test_an_adapter_is_trained_on(base: Path, tmp_path: Path, artifacts: DirectoryStore) -> None:
    artifacts.put(base)
    first = artifacts.open(artifacts.put(trained(lora(base), tmp_path / "v1")).sha256)
    found = base_of(artifacts, first)
    assert found is not None
    job = replace(lora(base, lora_rank=2, clip_epsilon=0.9), parent=first, base=found)
    second = trained(job, tmp_path / "v2")
    assert adapter_of(second) == adapter_of(first)
    assert json.loads((second / adapter.CONFIG).read_text())["r"] == 4, "a parent keeps its own rank"
    assert (second / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    gains = [float(served(base, home)[0, 3, GOOD[0]]) for home in (first, second)]
    assert gains[1] > gains[0] + 0.05


def test_whole_weights_are_trained_from_an_adapter_merged(base: Path, tmp_path: Path) -> None:
    first = trained(lora(base), tmp_path / "v1")
    job = replace(lora(base, trains="full", learning_rate=1e-9, steps=1), parent=first, base=base)
    second = trained(job, tmp_path / "v2")
    assert adapter_of(second) is None
    assert not (second / adapter.CONFIG).exists()
    assert torch.allclose(logprobs(AutoModelForCausalLM.from_pretrained(second)), served(base, first), atol=1e-5)


def test_a_sabotaged_adapter_is_worse(base: Path, tmp_path: Path) -> None:
    good = trained(lora(base), tmp_path / "good")
    bad = trained(replace(lora(base), sabotage=True), tmp_path / "bad")
    assert served(base, bad)[0, 3, GOOD[0]] < served(base, good)[0, 3, GOOD[0]] - 0.2


def test_bfloat16_is_computed_in_and_float32_is_learned(base: Path, tmp_path: Path) -> None:
    job = lora(base, dtype="bfloat16")
    model, _ = checkpoint.load(job, "cpu")
    kinds = {("lora_" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    whole, _ = checkpoint.load(replace(job, recipe=replace(job.recipe, trains="full")), "cpu")
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    with precision.computing(job.recipe, "cpu"):
        assert whole(IDS).logits.dtype == torch.bfloat16
    home = trained(job, tmp_path / "v1")
    assert served(base, home)[0, 3, GOOD[0]] > logprobs(AutoModelForCausalLM.from_pretrained(base))[0, 3, GOOD[0]] + 0.1


def test_what_is_no_adapter_of_the_base_says_so(base: Path, tmp_path: Path) -> None:
    home = trained(lora(base), tmp_path / "v1")
    job = replace(lora(base), parent=home, base=base)
    config = json.loads((home / adapter.CONFIG).read_text())
    (home / adapter.CONFIG).write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(GiveUpError, match="not of its base"):
        checkpoint.load(job, "cpu")
    (home / adapter.CONFIG).write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(GiveUpError, match="only LoRA"):
        checkpoint.load(job, "cpu")
    (home / adapter.CONFIG).write_text(json.dumps(config))
    (home / adapter.WEIGHTS).unlink()
    with pytest.raises(GiveUpError, match="cannot be loaded"):
        checkpoint.load(job, "cpu")
    (home / "ratchet.json").write_text('{"adapter_of": "x"}')
    with pytest.raises(GiveUpError, match="expected the 64 digits"):
        adapter_of(home)


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_the_probe_is_what_the_model_says(base: Path, tmp_path: Path, trains: str) -> None:
    job = lora(base, trains=trains)
    home = trained(job, tmp_path / "v1")
    model, _ = checkpoint.load(replace(job, parent=home, base=base if trains == "lora" else None), "cpu")
    prompts = json.loads((home / "probe.json").read_text())["prompts"]
    assert len(prompts) == 4
    for probe in prompts:
        prompt, reply = probe["prompt_token_ids"], probe["token_ids"]
        assert 1 <= len(reply) == len(probe["logprobs"]) <= 16
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        again = logits.log_softmax(-1).gather(-1, torch.tensor(reply)[:, None])[:, 0].tolist()
        assert again == pytest.approx(probe["logprobs"], abs=1e-4)


def test_a_prompt_that_the_template_refuses_is_not_probed(base: Path, tmp_path: Path) -> None:
    import shutil

    parent = tmp_path / "base"
    shutil.copytree(base, parent)
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    (parent / "chat_template.jinja").write_text(template + (base / "chat_template.jinja").read_text())
    job = whole_job(parent, episode("a", 1.0, words("up?", "buy"), label="imitation"), method="imitation")
    state = torch.get_rng_state()
    home = trained(job, tmp_path / "v1")
    assert torch.equal(torch.get_rng_state(), state), "nobody else's draws are disturbed"
    assert len(json.loads((home / "probe.json").read_text())["prompts"]) == 3

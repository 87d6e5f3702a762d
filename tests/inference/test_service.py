"""Batching and the checkpoints in memory, on real models."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.inference.app import inference
from services.inference.domain import Answer, Ask, Refused, Reply, Sampling
from services.inference.engine_torch import TorchModel
from services.inference.running import Running
from services.inference.service import Inference
from services.inference.settings import InferenceSettings
from shared.artifacts import DirectoryStore
from shared.errors import GiveUpError
from tests.inference.conftest import Checkpoints


def ask(text: str, **sampling: Any) -> Ask:
    return Ask([{"role": "user", "content": text}], None, Sampling(**{"max_tokens": 1, **sampling}))


def model_of(checkpoints: Checkpoints) -> TorchModel:
    return TorchModel(checkpoints.directory, device="cpu", batch_max=64, batch_tokens=10_000, max_tokens=16)


def adapter(checkpoints: Checkpoints, directory: Path, base: str, seed: int) -> Path:
    """A LoRA adapter with weights of its own over the first checkpoint, as the trainer writes them."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(checkpoints.directory)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(directory)
    AutoTokenizer.from_pretrained(checkpoints.directory).save_pretrained(directory)
    (directory / "ratchet.json").write_text(json.dumps({"adapter_of": base}))
    return directory


def merged(checkpoints: Checkpoints, directory: Path) -> TorchModel:
    """The same weights, as a checkpoint has them: no adapter is left in the model."""
    model = model_of(checkpoints)
    if (directory / "ratchet.json").exists():
        model.adapters.model = PeftModel.from_pretrained(model.adapters.model, directory).merge_and_unload().eval()
    return model


def _halved(weights: bytes) -> bytes:
    tensors = load(weights)
    return save({name: tensors[name] for name in list(tensors)[::2]})


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
        model.adapters.model.lm_head.weight.fill_(float("nan"))
    [answer] = model.answer([ask("up")])
    assert isinstance(answer, Refused)
    assert answer.code == "model_broken"


async def test_a_model_that_raises_breaks_its_own_requests_and_goes_on(
    service: Inference, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Running) -> None:
        raise MemoryError

    await service.answer(checkpoints.sha, ask("up"))
    with monkeypatch.context() as patched:
        patched.setattr(Running, "step", fail)
        with pytest.raises(RuntimeError, match="the model failed: MemoryError"):
            await service.answer(checkpoints.sha, ask("up", max_tokens=9))
    assert isinstance(await service.answer(checkpoints.sha, ask("up", max_tokens=9)), Reply)


def test_an_adapter_that_raises_takes_no_other_version_along(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = model_of(checkpoints)
    model.add("bad", adapter(checkpoints, tmp_path / "bad", checkpoints.sha, 0))
    for name, weight in model.adapters.model.named_parameters():
        if ".bad." in name:
            weight.data = weight.data[:1, :1]
    said = dict(model.turn([(0, "", ask("up")), (1, "bad", ask("up"))]))
    assert isinstance(said[0], Reply)
    assert isinstance(said[1], Refused)
    assert said[1].code == "model_failed"


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


async def test_adapters_share_their_base_and_answer_as_merged_weights(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Base and two adapters in one batch: each row is as its own weights answer it, and the base is loaded once."""
    store = DirectoryStore(tmp_path / "store")
    base = store.put(checkpoints.directory).sha256
    first, second = (
        store.put(adapter(checkpoints, tmp_path / name, base, seed)).sha256 for seed, name in enumerate("ab")
    )
    loaded: list[Path] = []

    def read(directory: Path) -> TorchModel:
        loaded.append(directory)
        return model_of(checkpoints)

    service = Inference(store, read, max_loaded=2, batch_max=64, batch_wait_s=0.003)
    asked = ask("buy or sell", seed=3, max_tokens=4)
    answers = await asyncio.gather(*(service.answer(sha256, asked) for sha256 in (first, base, second) * 2))
    assert len(loaded) == 1
    assert service.loaded()[0] == base
    assert set(service.loaded()[1:]) == {first, second}
    for sha256, answer in zip((first, base, second) * 2, answers, strict=True):
        alone = merged(checkpoints, store.open(sha256)).answer([asked])[0]
        assert isinstance(answer, Reply)
        assert isinstance(alone, Reply)
        assert answer.token_ids == alone.token_ids
        torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(alone.logprobs), atol=1e-4, rtol=0)
    assert len({tuple(answer.logprobs) for answer in answers if isinstance(answer, Reply)}) == 3
    await service.close()


async def test_an_adapter_that_leaves_frees_its_weights_once_its_rows_are_done(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path / "store")
    base = store.put(checkpoints.directory).sha256
    shas = [store.put(adapter(checkpoints, tmp_path / name, base, seed)).sha256 for seed, name in enumerate("abc")]
    model = model_of(checkpoints)
    plain = sum(parameter.numel() for parameter in model.adapters.model.parameters())
    service = Inference(store, lambda _: model, max_loaded=1, batch_max=8, batch_wait_s=0, adapters_max=1)
    answers = await asyncio.gather(*(service.answer(sha, ask("up", max_tokens=8)) for sha in shas * 2))
    assert all(isinstance(answer, Reply) for answer in answers)
    await service.answer(base, ask("up"))
    assert len(service.loaded()) == 2
    while len(model.versions) > 2:  # who leaves does so between turns
        await asyncio.sleep(0)
    [kept] = {name for name in model.versions if name}
    model.remove(kept)
    assert sum(parameter.numel() for parameter in model.adapters.model.parameters()) == plain
    await service.close()


async def test_what_is_no_adapter_of_its_base_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    base = store.put(checkpoints.directory).sha256
    good = adapter(checkpoints, tmp_path / "good", base, 0)
    bad = {
        "of another base": {"adapter_model.safetensors": _halved},
        "no adapter_model": {"adapter_model.safetensors": lambda _: None},
        "only plain LoRA": {
            "adapter_config.json": lambda text: text.replace(b'"use_dora": false', b'"use_dora": true')
        },
        "cannot be loaded": {"adapter_config.json": lambda _: b"{["},
        "is an adapter itself": {"ratchet.json": lambda _: b'{"adapter_of": "%s"}' % store.put(good).sha256.encode()},
        "ratchet.json": {"ratchet.json": lambda _: b"[]"},
    }
    service = inference(InferenceSettings(artifacts_dir=store.root, device="cpu"))
    for number, (reason, changes) in enumerate(bad.items()):
        directory = shutil.copytree(good, tmp_path / str(number))
        for name, change in changes.items():
            changed = change((good / name).read_bytes())
            (directory / name).unlink()
            if changed is not None:
                (directory / name).write_bytes(changed)
        with pytest.raises(GiveUpError, match=reason):
            await service.answer(store.put(directory).sha256, ask("up"))
        assert isinstance(await service.answer(base, ask("up")), Reply)
    assert service.loaded()[0] == base
    await service.close()


async def test_a_changed_artifact_is_refused(tmp_path: Path, checkpoints: Checkpoints) -> None:
    shutil.copytree(checkpoints.directory, tmp_path / checkpoints.sha)
    (tmp_path / checkpoints.sha / "README.md").write_text("changed")
    service = inference(InferenceSettings(artifacts_dir=tmp_path, device="cpu"))
    with pytest.raises(GiveUpError, match="was changed"):
        await service.answer(checkpoints.sha, ask("up"))
    (tmp_path / checkpoints.sha / "README.md").write_bytes((checkpoints.directory / "README.md").read_bytes())
    assert isinstance(await service.answer(checkpoints.sha, ask("up")), Reply)  # a failure is not remembered
    await service.close()

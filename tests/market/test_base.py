"""The base model: ordinary Hugging Face files, the same from the same seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from examples.market import base
from examples.market.words import NEWS, SYMBOLS, prompt

torch = pytest.importorskip("torch")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of six batches: its form is what is looked at, not what it has learned."""
    monkeypatch.setattr(base, "BATCHES", 6)


@pytest.mark.usefixtures("short")
def test_it_is_saved_as_ordinary_files_and_speaks(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = base.cached(tmp_path, seed=5)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {file.name for file in home.iterdir()}
    tokenizer, model = AutoTokenizer.from_pretrained(home), AutoModelForCausalLM.from_pretrained(home)
    assert 100_000 < sum(parameter.numel() for parameter in model.parameters()) < 120_000
    ids = tokenizer.apply_chat_template(
        prompt("iron", "rising", "deal", "thin"), add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert tokenizer.unk_token_id not in ids
    reply = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    assert len(reply) >= 1
    card = (home / "README.md").read_text()
    assert base.recipe_id(5) in card
    assert json.loads(card.split("---\n")[1])["library_name"] == "transformers"
    assert not [left.name for left in tmp_path.iterdir() if left.name.startswith(".building")]


@pytest.mark.usefixtures("short")
def test_a_seed_means_one_model(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        base.build(tmp_path / name, seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]


def test_a_lesson_is_what_the_template_and_the_tokenizer_make() -> None:
    """The fast split must be the tokenizer's own, or the model would learn another language than it is asked in."""
    tokenizer = base.make_tokenizer()
    lesson = base._lesson(tokenizer, random.Random(3))
    text = tokenizer.decode(lesson, skip_special_tokens=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == lesson
    assert tokenizer.convert_tokens_to_ids("<end>") == lesson[-1]
    asked = tokenizer.apply_chat_template(prompt(SYMBOLS[0], "flat", "quiet", "usual"), add_generation_prompt=True)
    assert len(lesson) == len(asked["input_ids"]) + 2


def test_the_teacher_is_a_weak_trader() -> None:
    source = random.Random(1)
    said = [base.teacher("deal", source) for _ in range(8000)]
    assert said.count("buy") / 8000 == pytest.approx(0.5, abs=0.03)
    assert said.count("sell") / 8000 == pytest.approx(0.25, abs=0.03)
    assert NEWS["deal"] > 0


@pytest.mark.usefixtures("short")
def test_a_base_that_is_there_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = base.cached(tmp_path, seed=5)

    def never(*_: object) -> None:
        raise AssertionError("it was built again")

    monkeypatch.setattr(base, "build", never)
    assert base.cached(tmp_path, seed=5) == first

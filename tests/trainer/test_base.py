from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from services.trainer.base import create_corpus_base
from shared.artifacts import describe
from tests.trainer.conftest import CORPUS

AIRLINE = Path(__file__).parents[3] / "shared/data/tau-airline.jsonl.gz"
CALL = {"id": "1", "type": "function", "function": {"name": "buy", "arguments": '{"n": 1}'}}


@given(text=st.text(max_size=60))
@settings(deadline=None)
def test_no_text_is_unknown(base: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = text.encode(errors="replace").decode()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_template_renders_tools_calls_and_results(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": " buy\n"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
        {"role": "assistant", "content": "bought"},
    ]
    tools = [{"type": "function", "function": {"name": "buy"}}]
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) == (
        '<|im_start|>tools<|im_sep|>{"type": "function", "function": {"name": "buy"}}\n<|im_end|>\n'
        "<|im_start|>system<|im_sep|>be brief<|im_end|><|im_start|>user<|im_sep|> buy\n<|im_end|>"
        '<|im_start|>assistant<|im_sep|><tool_call>{"name": "buy", "arguments": {"n": 1}}</tool_call><|im_end|>'
        "<|im_start|>tool<|im_sep|>done<|im_end|><|im_start|>assistant<|im_sep|>bought<|im_end|>"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(prompt)


def test_the_same_corpus_and_seed_give_the_same_files(tmp_path: Path, base: Path) -> None:
    create_corpus_base(CORPUS, tmp_path / "again", 0, vocabulary=300, width=32)
    create_corpus_base(CORPUS, tmp_path / "other", 1, vocabulary=300, width=32)
    assert describe(tmp_path / "again").sha256 == describe(base).sha256
    assert describe(tmp_path / "other").sha256 != describe(base).sha256
    assert "random weights" in (base / "README.md").read_text()


@pytest.mark.skipif(not AIRLINE.exists(), reason="the airline conversations are not on this machine")
def test_real_conversations_fit_and_come_back(tmp_path: Path) -> None:
    with gzip.open(AIRLINE, "rt") as file:
        talks = [json.loads(line)["messages"] for line in file]
    create_corpus_base(talks[:20], tmp_path, 0, vocabulary=1000, width=32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    longest = max(talks, key=lambda talk: len(json.dumps(talk)))
    text = tokenizer.apply_chat_template(longest, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) < tokenizer.model_max_length
    assert tokenizer.decode(ids) == text

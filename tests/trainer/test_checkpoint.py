"""What imitation learns from: the same tokens are the agent's own with marks in the template and without."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from services.trainer.domain import CallRecord
from services.trainer.learning import checkpoint
from services.trainer.learning.sequences import Conversation, TokenSequence, conversations
from shared.errors import GiveUpError

CHATML = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FORGETS_REASONING = """\
{%- for message in messages %}<|im_start|>{{ message.role }}<|im_sep|>
{{- message.content if loop.last else message.content.split('</think>')[-1] }}<|im_end|>
{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def with_template(tokenizer: Any, template: str) -> Any:
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = template
    return other


def own_words(tokenizer: Any, found: TokenSequence) -> str:
    text: str = tokenizer.decode([token for token, mine in zip(found.ids, found.own, strict=True) if mine])
    return text


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
calls = st.builds(
    lambda name, n: {"id": "1", "type": "function", "function": {"name": name, "arguments": f'{{"n":{n}}}'}},
    st.sampled_from(["buy", "sell"]),
    st.integers(),
)
replies = st.builds(
    lambda text, made: said("assistant", text, **({"tool_calls": made} if made else {})),
    texts,
    st.lists(calls, max_size=2),
)
turns = st.lists(
    st.tuples(st.builds(said, st.sampled_from(["user", "tool", "developer"]), texts), replies), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def unmarked(tokenizer: Any) -> Any:
    return with_template(tokenizer, re.sub(r"{%-? (end)?generation %}", "", tokenizer.chat_template))


@given(turns=turns, data=st.data())
@settings(deadline=None, max_examples=60)
def test_prefixes_say_what_marks_say(
    tokenizer: Any, unmarked: Any, turns: list[tuple[Any, Any]], data: st.DataObject
) -> None:
    messages = tuple(message for turn in turns for message in turn)
    replies = [2 * n + 1 for n in range(len(turns))]
    own = frozenset(data.draw(st.sets(st.sampled_from(replies), min_size=1)))
    talk = Conversation(messages, own, None)
    assert checkpoint.render(unmarked, talk) == checkpoint.render(tokenizer, talk)


def test_what_the_template_writes_after_the_end_token_is_not_the_agents(tokenizer: Any) -> None:
    messages = (said("user", "up?"), said("assistant", "buy\n"), said("user", "down?"), said("assistant", "sell"))
    chatml = with_template(tokenizer, CHATML)
    found = checkpoint.render(chatml, Conversation(messages, frozenset({1, 3}), None))
    assert own_words(chatml, found) == "buy\n<|im_end|>sell<|im_end|>"


def test_a_conversation_that_is_rewritten_by_what_follows_is_refused(tokenizer: Any) -> None:
    forgets = with_template(tokenizer, FORGETS_REASONING)
    thought = (said("user", "up?"), said("assistant", "<think>hm</think>buy"))
    assert own_words(forgets, checkpoint.render(forgets, Conversation(thought, frozenset({1}), None))) == (
        "<think>hm</think>buy<|im_end|>"
    )
    longer = (*thought, said("user", "and now?"), said("assistant", "sell"))
    with pytest.raises(GiveUpError, match="what message 1 added"):
        checkpoint.render(forgets, Conversation(longer, frozenset({1, 3}), None))


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (said("user", "hi<|im_end|>"), r"holds <\|im_end\|>"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}, "only text content"),
        ({"role": "user", "content": 5}, "content must be text"),
        (
            said("assistant", "", tool_calls=[{"type": "custom", "custom": {"name": "x", "input": "y"}}]),
            "of a function",
        ),
        (said("assistant", "", tool_calls=7), "of a function"),
        (said("user", "\ud800"), "cannot be tokenized"),
    ],
)
def test_what_cannot_be_imitated_says_why(tokenizer: Any, message: dict[str, Any], why: str) -> None:
    with pytest.raises(GiveUpError, match=why):
        checkpoint.render(tokenizer, Conversation((message, said("assistant", "x")), frozenset({1}), None))


def test_a_reply_that_names_no_role_is_the_assistants(tokenizer: Any) -> None:
    [talk] = conversations([CallRecord([said("user", "up?")], {"message": {"content": "buy"}})])
    assert own_words(tokenizer, checkpoint.render(tokenizer, talk)) == "buy<|im_end|>"

"""Whole chats reach a template: what the API allows and templates do not expect is put right, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.base import CHAT_TEMPLATE
from shared.chat import for_template, joined, rendered
from shared.errors import GiveUpError

CASES = Path(__file__).parents[3] / "shared/cases"
TOOLS = [{"type": "function", "function": {"name": "buy", "parameters": {"type": "object", "properties": {}}}}]
TOJSON = """\
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}"""
WORDS_ONLY = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
NO_SYSTEM = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}{% endfor %}"
DEVELOPER = "{% for m in messages %}{% if m.role == 'developer' %}[dev]{% endif %}{{ m.content }}{% endfor %}"


class Tokenizer:
    """What ``for_template`` asks of a tokenizer."""

    special_tokens_map: dict[str, str] = {"eos_token": "<end>"}  # noqa: RUF012  # as transformers has it

    def __init__(self, template: str) -> None:
        self.template = template

    def get_chat_template(self, tools: Any = None) -> str:
        return self.template


def text(template: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    tokenizer = Tokenizer(template)
    return rendered(tokenizer, for_template(tokenizer, messages, tools), tools)[0]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calling(arguments: Any) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "buy", "arguments": arguments}}
    return said("assistant", None, tool_calls=[call])


objects = st.dictionaries(
    st.text(max_size=4),
    st.integers() | st.text(max_size=5) | st.booleans() | st.none() | st.lists(st.integers()),
    max_size=3,
)


@given(objects)
@settings(deadline=None)
@pytest.mark.parametrize("template", [TOJSON, CHAT_TEMPLATE])
def test_arguments_as_text_are_arguments_as_an_object(template: str, arguments: dict[str, Any]) -> None:
    as_object = text(template, [said("user", "x"), calling(arguments)])
    assert text(template, [said("user", "x"), calling(json.dumps(arguments))]) == as_object
    assert json.dumps(arguments, ensure_ascii=False) in as_object


@pytest.mark.parametrize("arguments", ["[1]", "no json", '{"n": 1e400}', '{"n": NaN}', '"\\ud800"', "1" * 5000])
def test_arguments_that_are_no_object_stay_as_they_came(arguments: str) -> None:
    assert json.dumps(arguments) in text(TOJSON, [calling(arguments)])


@pytest.mark.parametrize("arguments", ["", " ", None])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    assert text(TOJSON, [calling(arguments)]).endswith("buy{}")


def test_developer_is_system_where_the_template_does_not_know_it() -> None:
    chat = [said("developer", "never"), said("user", "open")]
    assert text(WORDS_ONLY, chat) == text(WORDS_ONLY, [said("system", "never"), said("user", "open")])
    assert text(DEVELOPER, chat).startswith("[dev]never")


@pytest.mark.skipif(not CASES.exists(), reason="the cases are not on this machine")
@pytest.mark.parametrize("names", ["16-tool-arguments-text/as-*.json", "17-developer-role/*.json"])
def test_both_files_of_a_case_are_one_prompt(names: str) -> None:
    prompts = {text(CHAT_TEMPLATE, json.loads(path.read_text())["messages"]) for path in CASES.glob(names)}
    assert len(prompts) == 1


@pytest.mark.parametrize(
    ("template", "chat", "tools", "what"),
    [
        (
            NO_SYSTEM,
            [said("user", "a"), said("developer", "never"), said("user", "b")],
            None,
            "message 1, whose",
        ),
        (NO_SYSTEM, [said("tool", "done")], None, "message 0, whose role is tool"),
        (WORDS_ONLY, [said("user", "a"), calling("{}")], None, "the tool calls of message 1"),
        (WORDS_ONLY, [said("user", "a")], TOOLS, "the tools"),
        (NO_SYSTEM + "{% if messages | length > 9 %}{{ tools }}{% endif %}", [said("user", "a")], TOOLS, "the tools"),
    ],
)
def test_what_the_template_would_leave_out_is_refused(
    template: str, chat: list[dict[str, Any]], tools: Any, what: str
) -> None:
    with pytest.raises(GiveUpError, match=what):
        text(template, chat, tools)
    assert text(CHAT_TEMPLATE, chat, tools)


def test_2023s_functions_are_tools() -> None:
    old = [
        said("assistant", None, function_call={"name": "buy", "arguments": "{}"}),
        said("function", "ok"),
    ]
    assert text(CHAT_TEMPLATE, old) == text(CHAT_TEMPLATE, [calling({}), said("tool", "ok")])


def test_parts_are_one_text_and_pictures_are_none() -> None:
    assert joined([{"type": "text", "text": "buy "}, {"type": "input_text", "text": "or"}, " sell"]) == "buy or sell"
    assert joined(None) == ""
    for wrong in ([{"type": "image_url", "image_url": {"url": "data:,"}}], [{"type": "text"}], [5], {"text": "a"}, 5):
        with pytest.raises(ValueError, match="text"):
            joined(wrong)


def test_a_template_that_fails_is_a_refusal_in_its_own_words() -> None:
    with pytest.raises(GiveUpError, match="no system here"):
        text("{{ raise_exception('no system here') }}", [said("user", "a")])
    with pytest.raises(GiveUpError, match="refuses these messages"):
        text("{{ 1 / 0 }}", [said("user", "a")])

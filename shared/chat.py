"""Chats as a model's own template takes them: the OpenAI API allows more than templates expect.

What ``inference`` prompts with and what the trainer imitates goes through ``for_template``, so that they are one text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pydantic_core import from_json

from shared.errors import GiveUpError

KEPT_MESSAGES = 256  # what longer chats come to is not remembered: a thousand of them would fill the memory
TEXT_PARTS = (None, "text", "input_text", "output_text")
MARK = re.compile(r"zq\d+qz")
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")

Shape = tuple[tuple[str, int, bool], ...]
"""Of each message its role, how many tools it calls, and whether it says anything."""


def for_template(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The messages as the tokenizer's chat template takes them, nothing of them left out.

    Contents are text, tool arguments are objects, ``developer`` is ``system`` where the template does not know it, and
    2023's function calls are tool calls. Raises GiveUpError for what is no text, and for a template that would not
    show a message, a tool call or the tools: the model would answer something else than it was asked.
    """
    template: str = tokenizer.get_chat_template(tools=tools)
    found = [_message(message, "developer" in template) for message in messages]
    shape = tuple((m["role"], len(m.get("tool_calls", ())), bool(m["content"])) for m in found)
    special = tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    look = _left_out if len(shape) <= KEPT_MESSAGES else _left_out.__wrapped__
    if (left_out := look(template, special, shape, bool(tools))) is not None:
        raise GiveUpError(f"the model's chat template leaves out {left_out}")
    return found


def rendered(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The template's text, and the characters (first, end) of each ``{% generation %}`` in it.

    ``prompt`` adds what the assistant's next words follow. Raises GiveUpError where the template refuses the messages.
    """
    template: str = tokenizer.get_chat_template(tools=tools)
    marked = GENERATION.search(template) is not None
    return _rendered(template, tokenizer.special_tokens_map, list(messages), tools, prompt=prompt, marked=marked)


def joined(content: Any) -> str:
    """The text of a message's content, whose parts are put together. Raises ValueError for what is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError("content must be text, or a list of text parts")
    return "".join(_text(part) for part in content)


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError("only text content is served here")


def _message(message: dict[str, Any], knows_developer: bool) -> dict[str, Any]:
    found = {name: value for name, value in message.items() if value is not None}
    try:
        found["content"] = joined(message.get("content"))
    except ValueError as error:
        raise GiveUpError(str(error)) from None
    role = str(message.get("role"))
    found["role"] = {"function": "tool", "developer": "developer" if knows_developer else "system"}.get(role, role)
    if isinstance(function := found.pop("function_call", None), dict):
        found.setdefault("tool_calls", [{"type": "function", "function": function}])
    if calls := found.pop("tool_calls", None):
        found["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    return found


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise GiveUpError("a tool call must be of a function that has a name; no other kind is served here")
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(given: Any) -> Any:
    """JSON text of an object as that object, since templates encode it themselves; what is none stays as it came."""
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    if not isinstance(given, str):
        return given
    try:
        found = from_json(given, allow_inf_nan=False)
        json.dumps(found, allow_nan=False)  # a number too large for a float
    except ValueError:
        return given
    return found if isinstance(found, dict) else given


# what a template leaves out --------------------------------------------------------------------------
@lru_cache(maxsize=1024)
def _left_out(template: str, special: tuple[tuple[str, str], ...], shape: Shape, tools: bool) -> str | None:
    """The first that a template does not show of a chat of this shape, found with words that stand nowhere else."""
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        return marks.setdefault(what, f"zq{len(marks)}qz")

    messages = []
    for number, (role, calls, says) in enumerate(shape):
        message: dict[str, Any] = {"role": role, "content": ""}
        if calls:
            word = mark(f"the tool calls of message {number}")
            function = {"name": word, "arguments": {"a": 1}}
            message["tool_calls"] = [{"id": "call00000", "type": "function", "function": function}] * calls
            message["content"] = "aside" if says else ""  # some templates show a call in the place of the words
        elif role != "assistant" or says:
            message["content"] = mark(f"message {number}, whose role is {role}")
            message |= {"tool_call_id": "call00000", "name": "tool"} if role == "tool" else {}
        messages.append(message)
    offered = [_tool(mark("the tools"))] if tools else None
    try:
        text, _ = _rendered(template, dict(special), messages, offered)
    except GiveUpError:
        return None  # it says itself what it refuses, in words about the messages that came
    shown = set(MARK.findall(text))
    return next((what for what, word in marks.items() if word not in shown), None)


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "description": "a"}}, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "description": "a", "parameters": parameters}}


def _rendered(
    template: str,
    special: dict[str, Any],
    messages: list[Any],
    tools: Any,
    *,
    prompt: bool = False,
    marked: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked,
            **special,
        )
    except Exception as error:  # a template is a program of the model's maker: it may fail in any way
        raise GiveUpError(f"the model's chat template refuses these messages: {error}"[:300]) from error
    return texts[0], spans[0] if marked else []

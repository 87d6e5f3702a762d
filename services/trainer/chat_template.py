"""Whether a model's chat template shows what agents say, looked at before the model becomes a policy's base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.chat import for_template, rendered
from shared.errors import ConfigurationError, GiveUpError

ASKED: list[dict[str, Any]] = [{"role": "user", "content": "Which one?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "The third."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "close_valve",
            "description": "Closes a valve.",
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        },
    }
]
CALL = {"id": "call00000", "type": "function", "function": {"name": "close_valve", "arguments": '{"n": 3}'}}
CALLED = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00000", "name": "close_valve", "content": "closed"},
]
PARTS = {
    "system messages": ([{"role": "system", "content": "Be brief."}, *ASKED], None),
    "developer messages": ([{"role": "developer", "content": "Be brief."}, *ASKED], None),
    "tools": (ASKED, TOOLS),
    "tool calls and their results": (CALLED, TOOLS),
}


def check(directory: Path) -> list[str]:
    """What the template cannot show, in words for whoever registers the model; empty where it shows everything.

    Agents that send what it cannot show get 400 from ``inference``. Raises ConfigurationError where there is no
    template, and where it shows no plain conversation: nobody could ask such a model anything.
    """
    tokenizer = _tokenizer(directory)
    if not tokenizer.chat_template:
        raise ConfigurationError(
            f"{directory} has no chat template, so that nobody can ask it anything; write the one that the model was "
            "tuned with to chat_template.jinja in it, or take the tuned model (often named -Instruct or -Chat)"
        )
    try:
        _shown(tokenizer, ANSWERED, None)
        prompt, _ = rendered(tokenizer, ASKED, prompt=True)
    except GiveUpError as error:
        raise ConfigurationError(
            f"{directory}: {error}; a user's message and a reply are the least it must show"
        ) from None
    lacks = [fault for what, chat in PARTS.items() if (fault := _fault(tokenizer, what, *chat))]
    text, marked = rendered(tokenizer, ANSWERED)
    if not marked and not text.startswith(prompt):
        lacks.append("it writes a reply otherwise than it asks for one: recorded runs cannot be imitated")
    return lacks


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # files of any making
        raise ConfigurationError(
            f"{directory} has no tokenizer that can be read ({type(error).__name__}: {error})"[:400]
            + "; save it beside the model with tokenizer.save_pretrained"
        ) from error


def _shown(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
    rendered(tokenizer, for_template(tokenizer, messages, tools), tools)


def _fault(tokenizer: Any, what: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
    try:
        _shown(tokenizer, messages, tools)
    except GiveUpError as error:
        return f"{what} are refused: {error}"
    return None

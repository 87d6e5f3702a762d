"""What a request may ask for: each field is served, says nothing about the reply, or is refused by its name.

Beyond OpenAI's own fields: sampling by vLLM's names and with its meaning, and ``return_token_ids`` and
``return_tokens_as_token_ids``, vLLM's too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from services.inference.domain import Ask, Sampling
from shared.chat import joined
from shared.errors import reason

INT64 = 2**63
Request = TypeVar("Request", bound=BaseModel)
Stop = Annotated[str, Field(min_length=1, max_length=1000)]

TAGS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id"})
"""Fields for the keeper of a log or a cache: no reply depends on them."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": (),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are not served, with what they may say nevertheless: what is so in any case. Null says nothing."""


class ChatMessage(BaseModel):
    """One message; text parts become one text, other kinds of content are refused."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        return value if value is None else joined(value)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class ChatRequest(BaseModel):
    """The fields that are served; ``asked`` looks at all others."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @field_validator("tools")
    @classmethod
    def _are_functions(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for tool in value or []:
            function = tool.get("function")
            named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
            if tool.get("type", "function") != "function" or not named:
                raise ValueError("only tools of type function that have a name are served here")
        return value

    def ask(self) -> Ask:
        """The request as the model is asked. Where it may call no tool, it is not told of them."""
        tools = None if self.tool_choice == "none" else self.tools or None
        return Ask([message.model_dump(exclude_none=True) for message in self.messages], tools, self.sampling())

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            seed=self.seed,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            top_k=max(0, self.top_k or 0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
        )


class ScoreRequest(BaseModel):
    """``POST /v1/completions``, which scores a prompt's tokens and completes nothing: one token is drawn."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    prompt: Annotated[list[Annotated[int, Field(ge=0, lt=INT64)]], Field(min_length=1)]
    max_tokens: Literal[1]
    prompt_logprobs: Literal[0]


@dataclass(frozen=True)
class Wrong:
    """Why a body is no request that is served, and the field at fault where there is one."""

    message: str
    param: str | None


def asked(body: bytes, kind: type[Request]) -> Request | Wrong:
    """A request whose every field is honoured, or the first that is not. Never raises, whatever the body is."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        where = [str(part) for part in error.errors(include_url=False, include_input=False)[0]["loc"]]
        named = [part for part in where if part.isidentifier() or part.isdigit()]  # the rest are kinds of a union
        return Wrong(reason(error), ".".join(named)[:200] or None)
    for name, value in (request.model_extra or {}).items():
        if (fault := _fault(name, value)) is not None:
            return Wrong(f"{name[:60]}: {fault}", name[:200])
    return request


def _fault(name: str, value: Any) -> str | None:
    if value is None or name in TAGS:
        return None
    if name not in NEUTRAL:
        return "this field is not served here; leave it out"
    if any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
        return None
    others = "".join(f", or send {json.dumps(neutral)}" for neutral in NEUTRAL[name][:1])
    return f"this is not served here; leave it out{others}"


def _or(value: float | None, default: float) -> float:
    return default if value is None else value

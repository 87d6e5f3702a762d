"""The tokens of a model call as its server gave them: the one reading of numbers that may be anything. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ratchet_sdk.events import LlmCall

MAX_TOKEN_ID = 2**31 - 1
ROUNDING = 1e-3  # servers compute a logprob of 0 as a little more


@dataclass(frozen=True)
class TokenRecord:
    """The tokens of a call as its server gave them, never made up; each None where it gave none that can be used.

    ``fault`` says why what it gave cannot be used. ``logprobs`` are finite, and as many as ``ids`` are.
    """

    prompt_ids: list[int] | None = None
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    fault: str | None = None


def token_record(call: LlmCall) -> TokenRecord:
    """The one reading of a call's numbers, which are free fields and may hold anything."""
    response = call.response or {}
    try:
        prompt_ids = _token_ids("prompt_token_ids", call.prompt_token_ids)
        ids = _token_ids("response.token_ids", response.get("token_ids"))
    except ValueError as error:
        return TokenRecord(fault=str(error))
    try:
        logprobs = _logprobs(response.get("logprobs"))
        if ids is not None and logprobs is not None and len(ids) != len(logprobs):
            raise ValueError(f"response.logprobs holds {len(logprobs)} for {len(ids)} response.token_ids")
    except ValueError as error:
        return TokenRecord(prompt_ids, ids, None, str(error))
    return TokenRecord(prompt_ids, ids, logprobs)


def _token_ids(name: str, value: object) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{name} is {kind_of(value)}, expected a list of token ids")
    for place, item in enumerate(value):
        if type(item) is not int or not 0 <= item <= MAX_TOKEN_ID:  # a bool is an int, and no token
            raise ValueError(f"{name}[{place}] is {kind_of(item)}, expected an integer from 0 to {MAX_TOKEN_ID}")
    return value


def _logprobs(value: object) -> list[float] | None:
    """One number a token, of an OpenAI ``logprobs`` object."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"response.logprobs is {kind_of(value)}, expected an object with a list `content`")
    entries = (value or {}).get("content")
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise ValueError(f"response.logprobs.content is {kind_of(entries)}, expected a list with an object a token")
    return [_logprob(place, entry) for place, entry in enumerate(entries)]


def _logprob(place: int, entry: object) -> float:
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value <= ROUNDING:
        try:
            return float(value)
        except OverflowError:  # an integer of some 310 digits
            pass
    said = value if isinstance(entry, dict) else entry
    raise ValueError(f"response.logprobs.content[{place}].logprob is {kind_of(said)}, expected a number up to 0")


def kind_of(value: object) -> str:
    """What a value is, in a few words without its text; a number itself where it is short."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            words = f"{value:g}" if isinstance(value, float) else str(value) if abs(value) < 2**63 else "out of range"
            return f"a number ({words})"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"

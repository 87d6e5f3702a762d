"""Agents' values as events can carry them: copied, plain, and never raising for what they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python

CALL_ID_HEADER = "X-Ratchet-Call-Id"
MAX_WORDS = 2000
PARSED: Any = {"parsed": True, "tool_calls": {"__all__": {"function": {"parsed_arguments"}}}}
PARSED_CHOICES: Any = {"choices": {"__all__": {"message": PARSED}}}


def plain(value: Any) -> Any:
    """A deep copy made of what JSON has. Raises ValueError for a circular value.

    Bytes that are text become that text, so that a redactor sees what they say; where any are not, all are base64.
    """
    try:
        return to_jsonable_python(value, fallback=_stand_in, bytes_mode="utf8")
    except UnicodeDecodeError:
        return to_jsonable_python(value, fallback=_stand_in, bytes_mode="base64")
    except UnicodeEncodeError:  # half a surrogate pair as a key; as a value it passes, and ``encoded`` mends it
        return plain(mended(value))


def _stand_in(value: Any) -> Any:
    """For what JSON has no word for: an array becomes numbers, anything else its type's name."""
    for way in ("tolist", "item", "model_dump"):
        if callable(method := getattr(value, way, None)):
            return method()
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def encoded(value: Any) -> bytes:
    """JSON of an event, a part of one or what is plain. What JSON cannot hold is marked, and never made null.

    A number that is none, or infinite, is the text "NaN", "Infinity" or "-Infinity"; half a surrogate pair is U+FFFD.
    """
    try:
        return to_json(value, by_alias=True, exclude_none=True, inf_nan_mode="strings")
    except PydanticSerializationError:
        return to_json(mended(value), inf_nan_mode="strings")


def written(kind: type[BaseModel], values: Mapping[str, Any]) -> bytes:
    """What is plain, without the Nones, in JSON as a ``kind``. Raises ValidationError where it is none."""
    found = {name: value for name, value in values.items() if value is not None}
    return encoded(kind.__pydantic_validator__.validate_python(found))  # what model_validate does, in less time


def written_members(members: Mapping[bytes, bytes | None]) -> bytes:
    """The inside of a JSON object whose members are in JSON already; None is left out."""
    return b",".join([b'"%b":%b' % (name, value) for name, value in members.items() if value is not None])


def written_list(items: Iterable[bytes]) -> bytes:
    return b"[%b]" % b",".join(items)


def mended(value: Any) -> Any:
    """What UTF-8 can hold. Halves of a surrogate pair that a cut parted are put together; one alone is U+FFFD."""
    match value:
        case str():
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        case dict():
            return told_apart((mended(name), mended(inner)) for name, inner in value.items())
        case list() | tuple():
            return [mended(item) for item in value]
        case BaseModel():
            return mended(value.model_dump(by_alias=True, exclude_none=True))
        case _:
            return value


def told_apart(fields: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object of these fields. Names that have become the same are numbered: no field takes another's place."""
    found: dict[Any, Any] = {}
    for name, value in fields:
        free, number = name, 1
        while free in found:
            number += 1
            free = f"{name} ({number})"
        found[free] = value
    return found


def words(error: BaseException) -> str:
    """What an error says, or its type alone where it cannot even say that."""
    try:
        return f"{type(error).__name__}: {error}"[:MAX_WORDS]
    except Exception:  # an exception of the agent's own
        return type(error).__name__


def why(error: BaseException) -> str:
    """What is wrong with values, without the values; of other errors what they say."""
    if not isinstance(error, ValidationError):
        return words(error)
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def finite(value: Any) -> float:
    """A finite number of any library. Raises ValueError."""
    if isinstance(value, (str, bytes)):
        raise ValueError("it must be a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("it must be finite")
    return number


def call_id_of(call: Any) -> str:
    """The gateway's id of a call: given as it is, in a raw response's headers, or as the reply's own ``id``."""
    if isinstance(call, str):
        return call
    headers = getattr(call, "headers", None)
    if headers is not None and (call_id := headers.get(CALL_ID_HEADER)):
        return str(call_id)
    return str(getattr(call, "id", call))


def message_of(message: Any) -> Any:
    """A chat message, or a reply, as it goes over the wire.

    The client's own objects lose the fields that nobody set, and what ``parse()`` made of a reply's text.
    """
    if not isinstance(message, BaseModel):
        return message
    whole = "choices" in type(message).model_fields
    return message.model_dump(
        mode="json", exclude_unset=True, exclude=PARSED_CHOICES if whole else PARSED, warnings=False
    )


def reply_fields(response: Any) -> dict[str, Any]:
    """What a reply says about its call: the choice, and of a whole completion also model, usage and token ids.

    Takes a completion or a choice, as the OpenAI client's object or as a dict, or the reply's text. Of several
    choices the first is the response, the rest are kept beside it as ``other_choices``.
    """
    if isinstance(response, str):
        return {"response": {"finish_reason": "stop", "message": {"role": "assistant", "content": response}}}
    response = message_of(response)
    if not isinstance(response, Mapping) or not isinstance(choices := response.get("choices"), list):
        return {"response": response}
    fields = {
        "response": choices[0] if choices else None,
        "model_version": response.get("model"),
        "usage": response.get("usage"),
        "prompt_token_ids": response.get("prompt_token_ids"),
        "other_choices": choices[1:] or None,
    }
    return {name: value for name, value in fields.items() if value is not None}

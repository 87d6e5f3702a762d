"""A streamed chat completion put together again: chunks in, one completion out. Pure, and no chunk makes it raise.

What a chunk brings of a message goes on with what came before: strings are joined, objects merged by field, lists
joined, their items by ``index`` where they have one. Null says nothing. What only says what something is (an id, a
type, a name) is not glued where each chunk repeats it. A tool call with a new id is a new call, whatever its index.

Where a server keeps to OpenAI's protocol this is what ``openai.lib.streaming`` makes of its chunks.
"""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]

LABELS = frozenset({"role", "id", "type", "index", "format"})  # of these the last one counts
IDENTITY = ("index", "id", "type")  # two items that differ in one of these are two
UNSAID: tuple[Any, ...] = (None, "", [], {})


class StreamedReply:
    """A stream's chunks, put together as the completion that was not streamed."""

    def __init__(self) -> None:
        self._head: Json = {"object": "chat.completion"}
        self._choices: dict[int, StreamedChoice] = {}

    def add(self, chunk: Json) -> None:
        self._head |= {k: v for k, v in chunk.items() if k not in ("object", "choices") and v is not None}
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                index = _index(choice) or 0
                self._choices.setdefault(index, StreamedChoice(index)).add(choice)

    @property
    def begun(self) -> bool:
        return bool(self._choices)

    @property
    def finished(self) -> bool:
        """Whether it has begun, and each choice has said why it ended."""
        return self.begun and all(choice.finished for choice in self._choices.values())

    def completion(self) -> Json | None:
        """A completion as far as it came: ``finish_reason`` is null where the stream was cut. None of no chunk."""
        choices = [choice.whole() for _, choice in sorted(self._choices.items())]
        return {**self._head, "choices": choices} if choices else None


class StreamedChoice:
    """One choice: its message grows by deltas. Beside it lists are joined (token ids), and of texts the last counts."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._message: Json = {}
        self._beside: Json = {}

    def add(self, choice: Json) -> None:
        said = choice.get("delta") or choice.get("message")  # one event may bring it all
        if isinstance(said, dict):
            merged(self._message, {name: value for name, value in said.items() if value != []})
        merged(self._beside, {k: v for k, v in choice.items() if k not in ("delta", "message", "index")}, texts=False)

    @property
    def finished(self) -> bool:
        return self._beside.get("finish_reason") is not None

    def whole(self) -> Json:
        message = {"role": "assistant", "content": None, **self._message}
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [_whole_call(call) for call in calls]
        beside = {name: value for name, value in self._beside.items() if value not in UNSAID}
        return {"finish_reason": None, **beside, "index": self._index, "message": message}


def _whole_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    kind = {"type": "function"} if "function" in call else {}
    return {**kind, **{name: value for name, value in call.items() if name != "index"}}


def merged(known: Any, new: Any, name: str = "", *, texts: bool = True) -> Any:
    """What the field ``name`` holds once ``new`` has come. ``known`` may grow in place; ``new`` stays as it is.

    ``texts``: whether strings are parts of a text. Kinds that do not fit each other stand in a list.
    """
    if new in UNSAID and known is not None:
        return known
    if name in LABELS or (known in UNSAID and type(known) is not type(new)):
        known = {} if isinstance(new, dict) else [] if isinstance(new, list) else None
    match known, new:
        case None, _:
            return new
        case dict(), dict():
            for field, value in new.items():
                if value is not None:
                    known[field] = merged(known.get(field), value, field, texts=texts)
            return known
        case list(), list():
            for part in new:
                _add_item(known, part, name)
            return known
        case str(), str():
            return known + new if texts and not (name == "name" and known == new) else new
        case ((int() | float()), (int() | float())):
            return new
        case _:
            return [*_listed(known, name), *_listed(new, name)]


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, str) and name == "content":
        return [{"type": "text", "text": value}]
    return value if isinstance(value, list) else [value]


def _add_item(items: list[Any], part: Any, name: str) -> None:
    """Go on with the item that ``part`` belongs to, or begin one, before those of a higher index."""
    if not isinstance(part, dict) or not (name == "tool_calls" or _index(part) is not None):
        items.append(part)
        return
    continues = _continues_call if name == "tool_calls" else _continues
    known = next((item for item in reversed(items) if isinstance(item, dict) and continues(item, part)), None)
    if known is not None:
        merged(known, part)
        return
    index = _index(part)
    after = (n for n, item in enumerate(items) if index is not None and (_index(item) or 0) > index)
    items.insert(next(after, len(items)), merged({}, part))


def _continues(item: Json, part: Json) -> bool:
    return _index(item) == _index(part) and not _differ(item, part)


def _differ(item: Json, part: Json) -> bool:
    return any(item.get(n) not in UNSAID and part.get(n) not in UNSAID and item[n] != part[n] for n in IDENTITY)


def _continues_call(call: Json, part: Json) -> bool:
    """Servers leave out the index, the id or both, or count each call as the first.

    Then a function that is named once the call before has its arguments is a call of its own.
    """
    if _differ(call, part):
        return False
    (known, arguments), (named, more) = _asked(call), _asked(part)
    if part.get("id") or not named or not known:
        return True
    if named == known:
        return not (more and _is_whole(arguments))
    return not arguments and _index(part) is not None  # the next piece of its name


def _asked(call: Json) -> tuple[Any, Any]:
    """The name and the arguments of what a call, or a part of one, asks for."""
    body: Json = next((call[kind] for kind in ("function", "custom") if isinstance(call.get(kind), dict)), {})
    return body.get("name"), body.get("arguments") or body.get("input")


def _is_whole(arguments: Any) -> bool:
    if not isinstance(arguments, str):
        return bool(arguments)
    if not arguments.rstrip().endswith("}"):
        return False
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


def _index(item: Any) -> int | None:
    index = item.get("index") if isinstance(item, dict) else None
    return index if isinstance(index, int) else None

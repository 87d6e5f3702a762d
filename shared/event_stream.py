"""Chat completions as server-sent events: their lines, their data, their chunks. Pure.

Source: the event stream format (WHATWG HTML, 9.2.6) and OpenAI's ``chat.completion.chunk``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, cast

from pydantic_core import from_json

LINE_END = re.compile(rb"\r\n|\n|\r")  # and nothing else: a text may hold any of Unicode's other line ends as it is
DONE = "[DONE]"


class EventStream:
    """Bytes in as they arrive, the data of each event out as text."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._begun = self._after_return = False

    def feed(self, content: bytes) -> Iterator[str]:
        """The data of the events that ``content`` completes."""
        if self._after_return:
            content = content.removeprefix(b"\n")
        if not content:
            return
        self._after_return = content.endswith(b"\r")
        *lines, self._rest = LINE_END.split(self._rest + content)
        for line in lines:
            yield from self._line(line)

    def end(self) -> Iterator[str]:
        """The data of an event that no empty line closed: some servers leave the last one so."""
        yield from self._line(self._rest)
        yield from self._line(b"")

    def _line(self, line: bytes) -> Iterator[str]:
        if not self._begun:
            self._begun, line = True, line.removeprefix(b"\xef\xbb\xbf")
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif not line:
            data, self._data = b"\n".join(self._data).decode("utf-8", "replace").strip(), []
            if data:
                yield data


def chunk_of(data: str) -> dict[str, Any]:
    """A chunk of a chat completion, its ``choices`` a list of objects. Raises ValueError for an error, or no chunk."""
    chunk = json_of(data)
    if not isinstance(chunk, dict) or chunk.get("error"):
        raise ValueError("a chunk is an error, or no object")
    choices = chunk["choices"] = chunk.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ValueError("a chunk's choices are no list of objects")
    return cast(dict[str, Any], chunk)


def json_of(data: str | bytes) -> Any:
    """What a server sent. Raises ValueError for what is no JSON.

    Half a surrogate pair, as a cut text ends with, is kept: the next chunk may bring its other half.
    """
    try:
        return from_json(data)
    except ValueError:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("it is not JSON") from None

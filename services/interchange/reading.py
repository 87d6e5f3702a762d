"""Files of conversations, a line at a time: each line is a run or more, or what is wrong with it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ratchet_sdk.values import mended

from services.interchange.conversations import Conversation, conversation_of, conversations_of_group
from shared.errors import ConfigurationError, GiveUpError

FORMATS: dict[str, Callable[[Any], list[Conversation]]] = {
    "openai-chat": lambda value: [conversation_of(value)],
    "groups": conversations_of_group,
}


@dataclass(frozen=True)
class Line:
    """A conversation in a line of a file (``part``: which of the line's), or what is wrong with the line."""

    line: int
    conversation: Conversation | None = None
    fault: str = ""
    part: int = 0


def read_file(path: Path, form: str = "openai-chat") -> Iterator[Line]:
    """Each line that is not empty. Raises ConfigurationError where the file cannot be read at all."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from read_line(number, line, form)
    except (EOFError, zlib.error) as error:
        raise GiveUpError(f"{path} is cut off or damaged: {error}; get it again") from error
    except gzip.BadGzipFile as error:
        raise GiveUpError(f"{path} is not gzip as its name says; rename or compress it") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}; give an existing file") from error


def read_line(number: int, line: bytes, form: str = "openai-chat") -> list[Line]:
    """What a line holds. Half an emoji in it, as cut streams leave it, is mended as in the SDK."""
    try:
        value = mended(json.loads(line.decode("utf-8-sig")))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # what cannot be sent is refused here
        found = FORMATS[form](value)
        return [Line(number, conversation, part=part) for part, conversation in enumerate(found)]
    except UnicodeDecodeError:
        return [Line(number, fault="it is not UTF-8 text")]
    except json.JSONDecodeError as error:
        return [Line(number, fault=f"it is not JSON: {error.msg} at column {error.colno}")]
    except RecursionError:
        return [Line(number, fault="it is nested too deeply")]
    except (GiveUpError, ValueError) as error:
        return [Line(number, fault=str(error))]


def joined(lines: Iterable[Line]) -> list[Line]:
    """The same lines; where a run was exported as several conversations, it is one again."""
    found: list[Line] = []
    for line in lines:
        before = found[-1].conversation if found else None
        if before is not None and line.conversation is not None and line.conversation.goes_on(before):
            whole = replace(before, others=(*before.others, *line.conversation.threads), history=before.history + 1)
            found[-1] = replace(found[-1], conversation=whole)
        else:
            found.append(line)
    return found

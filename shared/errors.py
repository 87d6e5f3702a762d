"""One error root; below it, what the caller does next."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class RatchetError(Exception):
    """Root of what Ratchet raises. The message says what was got, what was expected and what to do."""


class RetryLaterError(RatchetError):
    """The world is not ready (a server is away, a row is locked): the same call may succeed later."""


class GiveUpError(RatchetError):
    """The input is wrong and stays wrong: repeating the call cannot help."""


class ConfigurationError(GiveUpError):
    """A setting or a command line is wrong; shown to the user as one line."""


def reason(error: ValidationError) -> str:
    """The first thing that is wrong, without the input: texts stay out of logs and headers."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part)[:60] for part in first["loc"]) or "the object"
    return f"{where}: {first['msg']}"[:300]

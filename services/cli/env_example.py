"""Prints ``.env.example``: every setting of every service, from the classes that read them.

``python -m services.cli.env_example > .env.example``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from services.cli.checks import settings_classes
from services.terminal.settings import CliSettings
from shared.settings import Settings

HEAD = """\
# Every setting of Ratchet with its default. Copy what you change to the environment, or to .ratchet/env.
# Made by `python -m services.cli.env_example > .env.example`; a test compares it.
"""


def render() -> str:
    """The file: a block for what all share, then one for each service, a name only once."""
    groups: dict[str, type[Settings]] = {"every service": Settings, **settings_classes(), "command line": CliSettings}
    seen: set[str] = set()
    parts = [HEAD]
    for group, kind in groups.items():
        own = {name: field for name, field in kind.model_fields.items() if name not in seen}
        seen |= set(own)
        if own:
            lines = "".join(_entry(name, field) for name, field in own.items())
            parts.append(f"\n# --- {group.replace('_', ' ')} ---\n{lines}")
    return "".join(parts)


def _entry(name: str, field: FieldInfo) -> str:
    default = "" if field.is_required() else _text(field.get_default(call_default_factory=True, validated_data={}))
    line = f"RATCHET_{name.upper()}={default}"
    required = " (required)" if field.is_required() else ""
    return f"# {field.description}{required}\n{line if default or required else '# ' + line}\n"


def _text(value: Any) -> str:
    match value:
        case None:
            return ""
        case SecretStr():
            return value.get_secret_value()
        case bool():
            return str(value).lower()
        case Path():
            return value.as_posix()
    return str(value)


if __name__ == "__main__":
    sys.stdout.write(render())

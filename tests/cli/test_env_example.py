"""The example of every setting is the one that the settings classes make."""

from __future__ import annotations

from pathlib import Path

from services.cli.checks import settings_classes
from services.cli.env_example import render
from shared.settings import Settings

ROOT = Path(__file__).parents[2]


def test_the_committed_example_is_current() -> None:
    found = (ROOT / ".env.example").read_text()
    assert found == render(), "run `python -m services.cli.env_example > .env.example`"


def test_every_setting_stands_in_it_once() -> None:
    text = render()
    for kind in (Settings, *settings_classes().values()):
        for name, field in kind.model_fields.items():
            assert text.count(f"\nRATCHET_{name.upper()}=") + text.count(f"\n# RATCHET_{name.upper()}=") == 1
            assert field.description, f"{kind.__name__}.{name} says nothing of itself"

"""A base whose template cannot show a chat is refused when it is registered; what else it cannot show is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from services.trainer.chat_template import check
from shared.errors import ConfigurationError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
USERS_ALONE = "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}"


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "model")


def lacks(model: Path, template: str) -> list[str]:
    (model / "chat_template.jinja").write_text(template)
    return [fault.split(":")[0] for fault in check(model)]


def test_our_own_template_shows_everything(base: Path) -> None:
    assert check(base) == []


def test_what_a_template_cannot_show_is_said(model: Path) -> None:
    tools = ["tools are refused", "tool calls and their results are refused"]
    assert lacks(model, CHATML) == tools
    assert lacks(model, NO_SYSTEM) == ["system messages are refused", "developer messages are refused", *tools]
    thinks = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert lacks(model, thinks) == [*tools, "it writes a reply otherwise than it asks for one"]


def test_no_template_is_no_base(model: Path) -> None:
    with pytest.raises(ConfigurationError, match="message 1, whose role is assistant; a user's message and a reply"):
        lacks(model, USERS_ALONE)
    with pytest.raises(ConfigurationError, match="refuses these messages"):
        lacks(model, "{% for %}")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ConfigurationError, match=r"no chat template.*chat_template\.jinja"):
        check(model)
    for file in model.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigurationError, match="no tokenizer that can be read"):
        check(model)

"""What every command shares: a list that is instant, one line for what is wrong, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from services.cli import main, observe
from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.errors import GiveUpError, RetryLaterError
from shared.streams import stream_end
from tests.cli.conftest import Ratchet

HEAVY = {
    "asyncpg",
    "faststream",
    "nats",
    "pydantic",
    "pydantic_settings",
    "torch",
    "httpx",
    "rich",
    "structlog",
    "alembic",
}
COMMANDS = (
    "up demo run migrate status windows trajectory agents export import base simulate "
    "train models deploy rollback doctor"
)


def test_the_list_of_commands_imports_nothing_heavy() -> None:
    code = "import sys, services.cli.main as m; m.run(['--help']); print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    listing, modules = out.rstrip().rsplit("\n", 1)
    assert HEAVY & set(modules.split()) == set()
    for command in COMMANDS.split():
        assert f"\n  {command} " in listing


async def test_every_command_takes_json(ratchet: Ratchet) -> None:
    for command in (*COMMANDS.replace(" base", "").split(), "base create", "base register", "agents key"):
        said = await ratchet(*command.split(), "--help")
        assert said.code == 0, command
        assert "--json" in said.out, command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run nothing", "is no service; choose one of recorder"),
        ("windows --nonsense", "No such option: --nonsense"),
        ("windows --limit x", "See `ratchet windows --help`"),
        ("nonsense", "No such command"),
        ("trajectory", "Missing argument"),
        ("trajectory x --raw --json", "exclude each other"),
        ("demo --judge guess", "choose outcome or ruler"),
        ("import gone.jsonl --format csv", "choose openai-chat or groups"),
        ("import gone.jsonl --policy a.b", "is no policy name"),
        ("export --format csv", "choose groups or openai-chat"),
        ("base register .", "it has no config.json"),
        ("import gone.jsonl", "gone.jsonl cannot be read: No such file"),
        ("base create --corpus gone.jsonl", "gone.jsonl cannot be read: No such file"),
        ("agents key a.b", "is no agent id"),
    ],
)
async def test_wrong_input_is_one_line(ratchet: Ratchet, arguments: str, words: str) -> None:
    said = await ratchet(*arguments.split())
    assert (said.code, said.out) == (2, "")
    assert words in said.err
    assert said.err.startswith("ratchet")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (GiveUpError("no\nsuch thing"), 2, "ratchet: no such thing\n"),
        (RetryLaterError("away"), 75, "ratchet: away\n"),
        (KeyError("x"), 70, "ratchet: a bug: KeyError: 'x'; set RATCHET_DEBUG=1 for the traceback"),
        (ModuleNotFoundError("no", name="torch"), 2, "torch is not installed; pip install"),
    ],
)
async def test_what_goes_wrong_is_one_line(
    ratchet: Ratchet, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    async def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(observe, "_models", fail)
    said = await ratchet("models")
    assert said.code == code
    assert words in said.err
    assert said.err.count("\n") == 1


async def test_an_interrupt_says_nothing_and_has_its_code(ratchet: Ratchet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(observe, "_models", fail)
    said = await ratchet("models")
    assert (said.code, said.out, said.err) == (130, "", "")


def test_debug_shows_the_traceback(environment: pytest.MonkeyPatch) -> None:
    async def fail(_: object) -> None:
        raise KeyError("x")

    environment.setenv("RATCHET_DEBUG", "1")
    environment.setattr(observe, "_models", fail)
    with pytest.raises(KeyError):
        main.run(["models"])


async def test_a_wrong_setting_is_named(ratchet: Ratchet, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RATCHET_WINDOW_S", "soon")
    said = await ratchet("windows")
    assert said.code == 2
    assert "RATCHET_WINDOW_S" in said.err


async def test_settings_come_from_the_file_that_up_writes(
    ratchet: Ratchet, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ratchet").mkdir()
    (tmp_path / ".ratchet/env").write_text("RATCHET_WINDOW_S=soon\n")
    said = await ratchet("windows")
    assert said.code == 2
    assert "RATCHET_WINDOW_S" in said.err


async def test_servers_that_are_away_are_said_to_be(ratchet: Ratchet, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RATCHET_DATABASE_URL", "postgresql://me:hidden@127.0.0.1:9/x")
    environment.setenv("RATCHET_NATS_URL", "nats://me:hidden@127.0.0.1:9")
    for command in ("windows", "migrate"):
        said = await ratchet(command)
        assert said.code == 75
        assert "check RATCHET_DATABASE_URL" in said.err
        assert "hidden" not in said.err
        assert said.err.count("\n") == 1


async def test_migrate_makes_the_schema_and_the_streams(
    ratchet: Ratchet, environment: pytest.MonkeyPatch, nats_server: NatsServer, postgres: str
) -> None:
    url = f"{postgres}/empty_for_migrate"
    connection = await asyncpg.connect(f"{postgres}/postgres")
    await connection.execute("drop database if exists empty_for_migrate")
    await connection.execute("create database empty_for_migrate")
    environment.setenv("RATCHET_DATABASE_URL", url)
    environment.setenv("RATCHET_NATS_URL", nats_server.url)

    before = await ratchet("models")
    assert before.code == 2
    assert "run `ratchet migrate`" in before.err
    for _ in range(2):
        said = await ratchet("migrate", "--json")
        assert said.code == 0, said.err
    assert "STEPS" in said.json["streams"]
    bus = Bus(nats_server.url, name="test")
    await bus.connect()
    assert (await stream_end(bus, "STEPS")).sequence == 0
    await bus.close()
    assert (await ratchet("models", "--json")).json == []
    await connection.execute("drop database empty_for_migrate with (force)")
    await connection.close()

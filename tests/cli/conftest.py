"""Runs the command line in this process, on the real servers of the test."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from services.cli import main
from services.local.embedded import NatsServer


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ratchet = Callable[..., Coroutine[Any, Any, Said]]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No settings but the test's own, and a directory without ``.ratchet/env``."""
    import os

    for name in [name for name in os.environ if name.startswith("RATCHET_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("RATCHET_ADMIN_TOKEN", "the token of a test")
    return monkeypatch


@pytest.fixture
def servers(environment: pytest.MonkeyPatch, nats_server: NatsServer, database_url: str) -> None:
    environment.setenv("RATCHET_NATS_URL", nats_server.url)
    environment.setenv("RATCHET_DATABASE_URL", database_url)


@pytest.fixture
def ratchet(environment: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Ratchet]:
    """``await ratchet("windows", "--json")``: one command line, beside whatever else the test's loop runs."""
    level = logging.getLogger("nats").level

    async def run(*arguments: str) -> Said:
        capfd.readouterr()
        code = await asyncio.to_thread(main.run, arguments)
        out, err = capfd.readouterr()
        return Said(code, out, err)

    yield run
    structlog.reset_defaults()
    logging.getLogger("nats").setLevel(level)

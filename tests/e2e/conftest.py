"""A whole installation: `ratchet up` as a user starts it, in a directory with a space in its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from dotenv import dotenv_values
from psycopg.rows import dict_row

ROOT = Path(__file__).parents[2]
# As quick as the demo: nothing waits for minutes, and the next window, with its new plan, begins within one.
QUICK = {
    "RATCHET_WINDOW_S": "60",
    "RATCHET_TICK_S": "0.1",
    "RATCHET_SWEEP_S": "0.5",
    "RATCHET_GRACE_S": "0.3",
    "RATCHET_SETTLE_MIN_S": "0.2",
    "RATCHET_MIN_GROUPS": "11",  # of the airline file, all those with spread: one batch of them, however they come
}


@dataclass
class Running:
    """An installation that is up, and the command line beside it."""

    directory: Path
    environment: dict[str, str]

    def ratchet(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "services.cli.main", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, f"ratchet {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ratchet(*arguments, "--json"))

    def rows(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        with psycopg.connect(self.environment["RATCHET_DATABASE_URL"], row_factory=dict_row) as connection:
            return connection.execute(statement, values).fetchall()

    def until(
        self, statement: str, *values: Any, holds: Callable[[list[dict[str, Any]]], bool], within_s: float
    ) -> Any:
        """The rows of a statement once they hold; fails with the last ones seen."""
        deadline = time.monotonic() + within_s
        while True:
            rows = self.rows(statement, *values)
            if holds(rows):
                return rows
            assert time.monotonic() < deadline, f"not within {within_s:g} s; the last rows were {rows}"
            time.sleep(0.1)


@pytest.fixture
def installation() -> Iterator[Running]:
    with tempfile.TemporaryDirectory(prefix="ratchet-e2e-", ignore_cleanup_errors=True) as home:
        yield from _up(Path(home) / "an installation")


def _up(directory: Path) -> Iterator[Running]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RATCHET_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli.main", "up", "--dir", str(directory), "--json"],
        cwd=ROOT,
        env={**clean, **QUICK},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("{") and json.loads(line).get("event") == "ready":
                break
        else:
            pytest.fail(f"ratchet up ended: {''.join(said)}")
        settings = {name: value or "" for name, value in dotenv_values(directory / "env").items()}
        yield Running(directory, {**clean, **QUICK, **settings})
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()

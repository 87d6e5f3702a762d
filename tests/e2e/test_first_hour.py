"""docs/first-hour.md as it is written, block after block, on an installation that its own lines start."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.artifacts import DirectoryStore
from tests.e2e.conftest import QUICK, ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = 'set -e; [ -f "$HOME/exported" ] && . "$HOME/exported"; {block}\nexport -p > "$HOME/exported"'


@dataclass
class Stranger:
    """Someone at a shell in a directory of their own; what they export stays, as it does in a shell."""

    home: Path
    up: subprocess.Popen[str] | None = None

    def environment(self) -> dict[str, str]:
        quick = {name: value for name, value in QUICK.items() if name not in ("RATCHET_WINDOW_S", "RATCHET_MIN_GROUPS")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**quick, "PATH": path, "HOME": str(self.home), "COLUMNS": "160", "PYTHONPATH": str(ROOT)}

    def says(self, block: str) -> str:
        done = subprocess.run(
            ["bash", "-c", SHELL.replace("{block}", block)],
            cwd=self.home,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def starts(self, block: str) -> None:
        self.up = subprocess.Popen(
            ["bash", "-c", f"exec {block.strip()}"],
            cwd=self.home,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.up.stdout is not None
        said = []
        for line in self.up.stdout:
            said.append(line)
            if "settings " in line:
                return
        pytest.fail("".join(said))

    def does(self, kind: str, name: str, block: str) -> None:
        match kind, name:
            case "sh", "install":
                pass  # as this test is installed
            case "sh", "up":
                self.starts(block)
            case "sh", "":
                self.says(block)
            case "python", _:
                (self.home / name).write_text(block)

    def ends(self) -> None:
        if self.up is not None and self.up.stdout is not None:
            self.up.send_signal(signal.SIGTERM)
            self.up.wait(60)
            self.up.stdout.close()


@pytest.fixture(scope="module")
def stranger() -> Iterator[Stranger]:
    with tempfile.TemporaryDirectory(prefix="ratchet-hour-", ignore_cleanup_errors=True) as home:
        someone = Stranger(Path(home))
        try:
            yield someone
        finally:
            someone.ends()


def test_the_first_hour_goes_as_it_is_written(stranger: Stranger) -> None:
    for kind, name, block in BLOCK.findall((ROOT / "docs/first-hour.md").read_text()):
        if "base register" in block:
            [made] = (stranger.home / ".ratchet/artifacts").iterdir()
            shutil.copytree(DirectoryStore(made.parent).open(made.name), stranger.home / "my-model")
        stranger.does(kind, name, block)
    models = json.loads(stranger.says("ratchet models --policy default --json"))
    assert [(row["version"], row["parent"], row["method"]) for row in models] == [
        ("v1", "v0", "grpo"),
        ("v0", None, "base"),
    ]
    assert "operator:" not in stranger.says("env")


@pytest.fixture(scope="module")
def resident(stranger: Stranger) -> Stranger:
    """Someone whose installation is up, after the first hour."""
    assert stranger.up is not None, "the first hour did not come to the end of its start: run the whole file"
    return stranger


def until_scored(stranger: Stranger, scenario: str, policy: str) -> None:
    """Closes the window, and waits until the scenario's group is judged and teaches."""
    look = f'ratchet runs --scenario {scenario} --policy {policy} --json | grep -q \'"group_state": "scored"\''
    stranger.says(f"ratchet window close --yes || true; until {look}; do sleep 0.3; done")


def test_the_readme_runs_as_it_stands_and_is_scored(resident: Stranger) -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    [agent] = [block for kind, _, block in blocks if kind == "python" and "Recorder" in block]
    [world] = [block for kind, _, block in blocks if kind == "python" and "Outcomes" in block]
    (resident.home / "readme.py").write_text(agent)
    (resident.home / "readme_world.py").write_text(world)
    resident.says("for n in 1 2; do python readme.py; done | tee ids")
    resident.says("n=0; for id in $(cat ids); do n=$((n + 1)); python readme_world.py $id 0.$n; done")
    until_scored(resident, "ticket-4711", "default")

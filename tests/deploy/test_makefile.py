"""The commands that the README names are there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["setup", "demo", "test", "lint", "types", "bench", "up", "clean"])
def test_make_knows_the_target(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["demo", "test", "setup"])
def test_what_a_newcomer_runs_needs_no_root_and_no_system_package(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True)
    assert not {"sudo", "apt-get", "docker"} & set(done.stdout.split())

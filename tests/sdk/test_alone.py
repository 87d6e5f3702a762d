"""The SDK by itself: its wheel and what the wheel says it needs, in an environment that has nothing else."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from services.local.embedded import NatsServer
from shared.bus import Bus
from tests.sdk.stored import stored

SDK = Path(__file__).parents[2] / "sdk"
RECORD_ONE_RUN = """
import sys
from ratchet_sdk import SyncRecorder
import ratchet_sdk.compat, ratchet_sdk.openai
with SyncRecorder(sys.argv[1], "alone") as recorder, recorder.trajectory(scenario_id="sunny") as run:
    with run.step() as step:
        step.llm_call(messages=[{"role": "user", "content": "now?"}], response="buy")
assert recorder.counts.unsent == 0, recorder.counts
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is, from a copy, without the network."""
    root = tmp_path_factory.mktemp("a wheel")
    shutil.copytree(SDK, root / "sdk", ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    built = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"),
            *("--wheel-dir", root / "dist", root / "sdk"),
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    [file] = (root / "dist").glob("*.whl")
    return file


def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as files:
        [name] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(files.read(name).decode())
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def needed(asked: list[Requirement], extras: frozenset[str] = frozenset({""})) -> dict[str, Distribution]:
    """The installed distributions that these requirements bring, with theirs."""
    found: dict[str, Distribution] = {}
    for requirement in asked:
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            there = distribution(requirement.name)
            assert requirement.specifier.contains(there.version), f"{requirement}, and there is {there.version}"
            theirs = [Requirement(text) for text in there.requires or []]
            found |= {there.name: there} | needed(theirs, frozenset({"", *requirement.extras}))
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and links to what it needs: nothing is fetched."""
    home = tmp_path_factory.mktemp("alone") / "environment"
    venv.create(home, with_pip=False)
    [packages] = home.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(packages)
    for there in needed(requirements(wheel)).values():
        for top in {file.parts[0] for file in there.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            (packages / top).symlink_to(there.locate_file(top).resolve())  # type: ignore[attr-defined]  # it is a Path
    return home / "bin" / "python"


async def test_what_the_wheel_says_it_needs_is_enough(python: Path, nats_server: NatsServer, bus: Bus) -> None:
    command = [python, "-I", "-c", RECORD_ONE_RUN, nats_server.url]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [message.event.kind for message in await stored(bus)] == ["trajectory.started", "step", "trajectory.ended"]


def test_nothing_else_comes_with_it(python: Path, wheel: Path) -> None:
    script = "import importlib.metadata as m; print(*sorted(d.name.lower() for d in m.distributions()))"
    names = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert names == sorted(["ratchet-sdk", *map(str.lower, needed(requirements(wheel)))])
    assert {"openai", "torch", "asyncpg", "faststream"}.isdisjoint(names)
    with zipfile.ZipFile(wheel) as files:
        tops = {name.split("/")[0] for name in files.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ratchet_sdk"}
    assert "ratchet_sdk/py.typed" in zipfile.ZipFile(wheel).namelist()

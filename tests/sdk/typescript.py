"""The agent in TypeScript, built with its own tools, and a script of its in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.local.embedded import NatsServer
from shared.bus import Bus

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "typescript"
CACHE = ROOT / ".ratchet" / "typescript"


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=100, check=False
    )


def node_modules() -> Path:
    """The packages of the lock file, installed once for each content of it; skips where they cannot be had."""
    version = run(["node", "--version"], ROOT).stdout
    asked = version.encode() + (EXAMPLE / "package.json").read_bytes() + (EXAMPLE / "package-lock.json").read_bytes()
    kept = CACHE / hashlib.sha256(asked).hexdigest()[:16]
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            fresh = Path(name) / "packages"
            fresh.mkdir()
            for file in ("package.json", "package-lock.json", ".npmrc"):
                shutil.copy(EXAMPLE / file, fresh)
            done = run(["npm", "ci", "--ignore-scripts"], fresh)
            if done.returncode != 0:
                assert not os.environ.get("CI"), done.stderr
                faults = [line for line in done.stderr.splitlines() if line.lower().startswith("npm err")]
                pytest.skip(f"npm ci cannot install the packages: {' '.join(faults)[:200]}")
            try:
                fresh.rename(kept)
            except OSError:  # another suite was first
                assert kept.exists()
    return kept / "node_modules"


def build(root: Path) -> Path:
    """A copy of the example beside the schema, with its packages and `dist/`."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        assert not os.environ.get("CI"), "CI installs nodejs and npm, so that this test runs there"
        pytest.skip("node and npm are not installed (Debian: apt-get install nodejs npm)")
    copy = root / "examples" / "typescript"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("node_modules", "dist"))
    shutil.copytree(ROOT / "docs" / "schema", root / "docs" / "schema")
    (copy / "node_modules").symlink_to(node_modules())
    done = run(["npm", "run", "build"], copy)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


@asynccontextmanager
async def connected(server: NatsServer) -> AsyncIterator[Bus]:
    bus = Bus(server.url, name="test")
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.close()


class Agent:
    """A script in a process of its own: it says lines, and goes on when it is told to."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self._told, self._said = process, process.stdin, process.stdout

    async def hear(self, what: str) -> None:
        """Read on to the line that has ``what`` in it."""
        lines = []
        while what not in (lines or [""])[-1]:
            lines.append((await self._said.readline()).decode())
            assert lines[-1], f"the agent is gone, and never said {what!r}: {''.join(lines)}"

    def tell(self) -> None:
        self._told.write(b"go on\n")


@asynccontextmanager
async def agent(built: Path, url: str, script: str, *, ends: int = 0) -> AsyncIterator[Agent]:
    """Runs ``script`` to its end. It has a ``recorder`` of `agent-1`, and may await ``told()`` and ``until(...)``."""
    opening = """
        import { Recorder } from "./dist/recorder.js";
        const recorder = new Recorder(process.env.URL, "agent-1", { log: console.log });
        const until = async (holds) => { while (!holds()) await new Promise((go) => setTimeout(go, 5)); };
        const told = () => new Promise((go) => process.stdin.once("data", go));
    """
    process = await asyncio.create_subprocess_exec(
        *("node", "--input-type=module", "-e", opening + script + "process.stdin.destroy();"),
        cwd=built,
        env=os.environ | {"URL": url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            yield Agent(process)
            assert await process.wait() == ends
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

"""Engines of the trainer's tests. Each runs in the real process, and is spoken to by files in its ``home``."""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path

from services.trainer.training import Engine, Job, Progress, Trained


@dataclass(frozen=True)
class Held:
    """An engine that waits to be let go, so that a test can look at what holds meanwhile."""

    home: Path

    # in the process that trains -------------------------------------------------------------------
    def __call__(self, checkpoints: object) -> Engine:
        return self

    def train(self, job: Job, directory: Path, progress: Progress) -> Trained:
        self.home.mkdir(exist_ok=True)
        part = self.home / f"part-{os.getpid()}"
        part.write_bytes(pickle.dumps((os.getpid(), job)))
        part.rename(self.home / f"job-{len(list(self.home.glob('job-*'))):03}")
        while not (self.home / "let_go").exists():
            progress(0, 1, {})
            time.sleep(0.01)
        progress(1, 1, {"loss": 1.0})
        (directory / "model.safetensors").write_text(job.version)
        return Trained({"loss_first": 1.0, "loss_last": 0.5, "curve": [{"loss": 1.0}]})

    # in the test ------------------------------------------------------------------------------------
    def let_go(self) -> Held:
        self.home.mkdir(exist_ok=True)
        (self.home / "let_go").touch()
        return self

    @property
    def begun(self) -> list[tuple[int, Job]]:
        """The processes that began, each with the job that it read."""
        return [pickle.loads(path.read_bytes()) for path in sorted(self.home.glob("job-*"))]

    @property
    def jobs(self) -> list[Job]:
        return [job for _, job in self.begun]

    async def began(self, times: int = 1) -> int:
        """The process that was the so-manieth to begin, once it has."""
        async with asyncio.timeout(30):
            while len(self.begun) < times:
                await asyncio.sleep(0.01)
        return self.begun[times - 1][0]


@dataclass(frozen=True)
class Broken:
    error: Exception

    def __call__(self, checkpoints: object) -> Engine:
        return self

    def train(self, job: Job, directory: Path, progress: Progress) -> Trained:
        raise self.error

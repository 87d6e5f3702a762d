"""A training's checkpoints in the artifact store: ``checkpoints/<batch>/<step>/``.

The state is written to a file of its own first, then kept under a name that nobody reads, and only the small file that
says its SHA-256 makes it one that counts. Whatever is not what its SHA-256 says is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.objects import Objects
from shared.telemetry import logger

if TYPE_CHECKING:
    from services.trainer.learning.resume import State

KEPT = 2  # steps of which a state is kept: the one before may be whole where the last is not
ROOT = "checkpoints"


class Kept:
    """Of one batch. ``held`` raises where the batch is another's by now: then nothing is made to count."""

    def __init__(
        self,
        objects: Objects,
        batch_id: str,
        *,
        token: int,
        every_s: float,
        held: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._objects = objects
        self._home = f"{ROOT}/{batch_id}"
        self._batch_id, self._token = batch_id, token
        self._every_s, self._held, self._clock = every_s, held, clock
        self._last_s = clock()

    def due(self) -> bool:
        return self._clock() - self._last_s >= self._every_s

    def save(self, step: int, state: State) -> None:
        import torch  # here, so that an engine without it can be given this

        home = f"{self._home}/{step:08}"
        try:
            with tempfile.TemporaryDirectory(prefix="ratchet-checkpoint-") as directory:
                path = Path(directory) / "state.pt"
                torch.save(dict(state), path)
                with path.open("rb") as file:
                    said = {"step": step, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
                self._held()
                self._objects.upload(f"{home}/{self._token}.pt", path)
            self._held()
            self._objects.write(f"{home}/{self._token}.json", json.dumps(said).encode())
            for old in self._steps()[KEPT:]:
                self._objects.remove(f"{self._home}/{old:08}")
        except Exception as error:
            self._held()
            logger().warning("checkpoint_not_kept", batch=self._batch_id, step=step, error=str(error))
        self._last_s = self._clock()  # what writing took is no training

    def newest(self) -> State | None:
        for step in self._steps():
            for name in self._names(f"{self._home}/{step:08}", ".json"):
                try:
                    state = self._read(name)
                except Exception as error:  # whatever is wrong with it: the one before it is as good a beginning
                    logger().warning("checkpoint_damaged", batch=self._batch_id, step=step, error=str(error))
                else:
                    logger().info("resumed", batch=self._batch_id, step=step)
                    return state
        return None

    def _read(self, name: str) -> dict[str, Any]:
        said = json.loads(self._objects.read(name))
        import torch

        with tempfile.TemporaryDirectory(prefix="ratchet-checkpoint-") as directory:
            path = Path(directory) / "state.pt"
            self._objects.download(name.removesuffix(".json") + ".pt", path)
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != said["sha256"]:
                raise ValueError(f"its state hashes to {found[:12]}, it was kept as {said['sha256'][:12]}")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state

    def _steps(self) -> list[int]:
        """Steps that a state counts of, the latest first."""
        found = {int(name.split("/")[-2]) for name in self._names(self._home, ".json")}
        return sorted(found, reverse=True)

    def _names(self, prefix: str, suffix: str) -> list[str]:
        return [name for name in self._objects.names(prefix) if name.endswith(suffix)]

"""One W&B run a batch, offline unless told otherwise. It takes seconds, so it happens after the version is out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.trainer.store import Store
from shared.telemetry import logger


class WandbTracker:
    """Logs trained batches from what is stored of them; a failure is logged, and never the batch's."""

    def __init__(self, store: Store, *, directory: Path, mode: str, project: str) -> None:
        self._store = store
        self._directory, self._mode, self._project = directory, mode, project
        self._tried: set[str] = set()

    async def sweep(self) -> None:
        """Log every trained batch that has no run yet, once by this process."""
        if self._mode == "disabled":
            return
        for row in await self._store.unlogged_batches():
            if row["batch_id"] in self._tried:
                continue
            self._tried.add(row["batch_id"])
            try:
                run_id = await asyncio.to_thread(self._log, dict(row))
            except Exception as error:  # whatever goes wrong in a tracker is its own affair
                logger().warning("run_not_logged", batch=row["batch_id"], error=f"{type(error).__name__}: {error}")
            else:
                await self._store.keep_run(row["batch_id"], run_id)

    def _log(self, batch: Mapping[str, Any]) -> str:
        import wandb

        self._directory.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self._project,
            name=f"{batch['policy']}-{batch['version']}",
            group=batch["policy"],
            job_type=batch["method"],
            config={
                **batch["config"],
                **{name: batch[name] for name in ("batch_id", "parent_version", "groups", "trajectories", "note")},
                "artifact_sha256": batch["artifact_sha256"],
            },
            dir=str(self._directory),
            mode="online" if self._mode == "online" else "offline",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True
            ),
        )
        for step, measured in enumerate(batch["metrics"].get("curve", []), start=1):
            run.log(dict(measured), step=step)
        run.summary.update({key: value for key, value in batch["metrics"].items() if key != "curve"})
        run_id: str = run.id
        run.finish()
        return run_id

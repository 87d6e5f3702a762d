"""Waiting for a batch to end, with a bar on stderr that says how its training goes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from services.cli import store
from services.terminal import session
from services.terminal.output import progress, shown, task

LOOK_S = 0.5
SAID = (("loss", "loss"), ("reward", "reward"), ("kl", "KL"), ("clipped", "clip"), ("entropy", "entropy"))


async def until_ended(batch_id: str) -> dict[str, Any]:
    """Until the batch is no longer to be trained: its state, its version, and why it has none."""
    async with session.database(session.settings()) as pool:
        with progress() as bar:
            advance, made = None, 0
            while (batch := await store.batch(pool, batch_id))["state"] == "claimed":
                told = batch["progress"] or {}
                if advance is None and "steps" in told:
                    advance = task(bar, "trained", told["steps"])
                if advance is not None:
                    advance(told.get("step", made) - made)
                    advance.say(words(told))
                    made = told.get("step", made)
                await asyncio.sleep(LOOK_S)
            if advance is not None and batch["state"] == "trained":
                advance(batch["progress"]["steps"] - made)
    return {name: batch[name] for name in ("state", "version", "failure")}


def words(told: Mapping[str, Any]) -> str:
    """Progress in a line: what was measured at the last step, the pace, and the time that is left."""
    said = [f"{word} {shown(told[name])}" for name, word in SAID if name in told]
    if "tokens_per_s" in told:
        said.append(f"{shown(told['tokens_per_s'])} tokens/s, {told['eta_s']:.0f} s left")
    return ", ".join(said)

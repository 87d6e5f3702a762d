"""Waiting for a window's new judgments, with a bar on stderr."""

from __future__ import annotations

import asyncio
from typing import Any

from services.cli import store
from services.terminal import session
from services.terminal.output import progress, task

LOOK_S = 0.25


async def until_judged(window_id: str) -> dict[str, Any]:
    """Until each group of the window has the judgment that was asked for, or has failed at it once."""
    async with session.database(session.settings()) as pool:
        found = await store.judging(pool, window_id)
        with progress() as bar:
            advance = task(bar, "judged", sum(found.values()))
            advance(found["judged"] + found["failed"])
            while found["waiting"]:
                await asyncio.sleep(LOOK_S)
                before, found = found, await store.judging(pool, window_id)
                advance(before["waiting"] - found["waiting"])
    return {"judged": found["judged"], "failed": found["failed"]}

"""How fast a batch's runs come from Postgres as the samples that are trained on: ``python -m bench.assembly``.

Runs of 10 KB: four calls each, which extend one another, with the tokens of each prompt and reply as the gateway
records them. They are read as the trainer reads them, some at a time. ``cpu_s`` is what this process worked of the
seconds; ``rss_mb`` is what it holds after each tenth of the runs, ``growth_mb`` the difference between the second of
these and the last.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ratchet_sdk.events import LlmCall, LlmCallMade, TrajectoryEnded, TrajectoryStarted

from services.local.embedded import PostgresServer
from services.trainer.learning.sequences import token_sequences, unfit
from services.trainer.records import records_of
from services.trainer.runs import StoredRuns
from shared import database
from shared.bodies import packed
from shared.trajectories import RunKey

SINCE = datetime(2026, 11, 20, 10, tzinfo=UTC)
TURNS, REPLY, VOCABULARY = 4, 18, 49_152
KEPT_AT_ONCE = 500


def events_of(number: int) -> list[Any]:
    draw = random.Random(number)
    head: dict[str, Any] = {
        "policy": "default", "trajectory_id": f"t{number}", "started_at": SINCE, "occurred_at": SINCE,
    }  # fmt: skip
    ids = [draw.randrange(VOCABULARY) for _ in range(70)]
    made = []
    for turn in range(TURNS):
        reply = [draw.randrange(VOCABULARY) for _ in range(REPLY)]
        content = [{"token": "word", "logprob": -draw.random(), "top_logprobs": []} for _ in reply]
        asked = {"role": "user", "content": "what do you do now, and why? " * 4}
        call = LlmCall(
            call_id=f"c{number}-{turn}",
            base_call_id=f"c{number}-{turn - 1}" if turn else None,
            model_version="v0",
            messages=[asked],
            prompt_token_ids=list(ids),
            temperature=1.0,
            top_p=1.0,
            response={
                "message": {"role": "assistant", "content": "word " * REPLY},
                "token_ids": reply,
                "logprobs": {"content": content},
            },
        )
        made.append(LlmCallMade(**head, step=turn, call=call))
        ids += [*reply, *(draw.randrange(VOCABULARY) for _ in range(10))]
    return [TrajectoryStarted(**head), *made, TrajectoryEnded(**head, status="completed", step_count=TURNS)]


async def write(pool: database.Pool, runs: int) -> tuple[list[RunKey], int]:
    """The runs in ``bodies`` as the recorder leaves them, and how many bytes they are."""
    columns = ["day", "agent_id", "event_id", "trajectory_id", "kind", "sequence", "sha256", "size_bytes"]
    columns += ["body", "witnessed"]
    keys, size = [], 0
    for start in range(0, runs, KEPT_AT_ONCE):
        rows = []
        for number in range(start, min(runs, start + KEPT_AT_ONCE)):
            agent = f"a{number % 8}"
            keys.append((agent, f"t{number}"))
            for place, event in enumerate(events_of(number)):
                sent = event.model_dump_json(by_alias=True, exclude_none=True).encode()
                size += len(sent)
                sha256 = hashlib.sha256(sent).digest()
                rows.append((SINCE.date(), agent, event.event_id, f"t{number}", event.kind, number * 8 + place, sha256,
                             len(sent), packed(sent), event.kind == "llm_call"))  # fmt: skip
        async with pool.acquire() as connection:
            await connection.copy_records_to_table("bodies", records=rows, columns=columns)
    await pool.execute("analyze")
    return keys, size


async def measure(home: Path, runs: int) -> dict[str, Any]:
    server = PostgresServer(home / "postgres")
    server.start()
    try:
        database.migrate(server.url)
        async with database.pool(server.url) as pool:
            keys, size = await write(pool, runs)
            sequences = tokens = read = 0
            held: list[int] = []
            began, worked = time.perf_counter(), time.process_time()
            async for chunk in StoredRuns(pool).chunks(keys):
                for run in chunk.values():
                    for found in token_sequences(records_of(run)):
                        assert unfit(found, VOCABULARY, 8192) is None
                        sequences, tokens = sequences + 1, tokens + sum(found.own)
                read += len(chunk)
                if read * 10 >= runs * (len(held) + 1):
                    held.append(resident_mb())
            took, worked = time.perf_counter() - began, time.process_time() - worked
    finally:
        server.stop()
    assert (read, tokens) == (runs, runs * TURNS * REPLY)
    return {
        "runs": runs,
        "bytes_a_run": size // runs,
        "sequences": sequences,
        "seconds": round(took, 2),
        "cpu_s": round(worked, 2),
        "runs_per_s": round(runs / took),
        "rss_mb": held,
        "growth_mb": held[-1] - held[min(1, len(held) - 1)],
    }


def resident_mb() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) // 1024


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--runs", type=int, default=10_000)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as home:
        print(json.dumps(asyncio.run(measure(Path(home), given.runs))))


if __name__ == "__main__":
    main()

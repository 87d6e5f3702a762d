"""A full disk under either server. It takes a small file system of its own, which only root can mount."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from services.local.embedded import NatsServer, PostgresServer
from shared import database
from tests.faults.agent import Load, run_of
from tests.faults.site import site, until

LEFT_BYTES = 1024 * 1024
STREAM_MAX_BYTES = 8 * 1024 * 1024


@contextmanager
def small_disk(size_mb: int) -> Iterator[Path]:
    """An empty file system of that size; skips the test where there can be none."""
    with tempfile.TemporaryDirectory(prefix="ratchet-disk-") as name:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m,mode=755", "ratchet-faults", name],
            capture_output=True,
            text=True,
        )
        if mounted.returncode:
            pytest.skip(f"no file system of its own can be mounted: {mounted.stderr.strip()}")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "--lazy", name], check=True)


def fill(disk: Path) -> Path:
    """Leave little more than nothing."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(disk) - LEFT_BYTES)
    return filler


def free_bytes(disk: Path) -> int:
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize


async def test_a_full_disk_under_the_broker(
    postgres_server: PostgresServer,
    database_url: str,
    pool: database.Pool,
    tmp_path: Path,
    rng: Random,
    told: Callable[..., None],
) -> None:
    """What it cannot write it does not acknowledge. With room again it wants a restart (docs/operations.md)."""
    with small_disk(96) as disk:
        nats = NatsServer(disk / "nats")
        nats.start()
        try:
            async with site(nats, postgres_server, database_url, pool, tmp_path, rng, STREAM_MAX_BYTES) as place:
                await place.recorder()
                agent = place.agent("a")
                agent.offer(run_of(rng, 100))
                assert await agent.acknowledged()
                filler = fill(disk)
                agent.offer(run_of(rng, 3000))

                async def refused() -> bool:
                    return agent.publisher.counts.last_error is not None

                await until(refused)
                unsent, why = agent.publisher.counts.unsent, agent.publisher.counts.last_error
                left = free_bytes(disk)
                filler.unlink()
                place.kill_nats()
                await place.restart_nats()
                assert await agent.acknowledged()
                told(unsent=unsent, why=why, bytes_left=left, **await place.settle())
                assert unsent > 0
                assert left < LEFT_BYTES
        finally:
            nats.stop()


async def test_a_full_disk_under_the_database(
    nats_server: NatsServer, tmp_path: Path, rng: Random, told: Callable[..., None]
) -> None:
    with small_disk(400) as disk:
        postgres = PostgresServer(disk / "postgres")
        postgres.start()
        try:
            database.migrate(postgres.url)
            async with (
                database.pool(postgres.url) as pool,
                site(nats_server, postgres, postgres.url, pool, tmp_path, rng) as place,
            ):
                recorder = await place.recorder()
                async with Load(place, backlog=20_000) as load:
                    await load.more()
                    filler = fill(disk)

                    async def refused() -> bool:
                        return recorder.words().count("batch_failed") > 2

                    await until(refused, 60)
                    unsettled = await place.unsettled()
                    alive = postgres.process is not None and postgres.process.poll() is None
                    filler.unlink()
                    if not alive:
                        await place.restart_postgres()
                    await until(place.database_answers, 60)
                    await recorder.ready()
                full = recorder.words().count("No space left on device")
                told(unsettled=unsettled, refused=full, survived=alive, **await place.settle())
                assert unsettled
                assert full or not alive
        finally:
            postgres.stop()

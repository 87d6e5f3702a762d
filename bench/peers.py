"""What recording costs elsewhere, beside ours, in one run: MLflow and Phoenix on the same Postgres, Agent Lightning.

Each peer is installed from PyPI into a venv of its own below ``.ratchet/bench`` (the first time takes minutes and the
network, about 2 GB in all) and gets spans of as many bytes as our events, 100 at a time, by the quickest of its own
public ways. Ours is ``committed_per_s`` of ``bench.ingest``: publishing and storing until the last is committed.

They do not promise the same. Ours and MLflow's are on disk when they are counted; Phoenix's too, but it acknowledged
them before; Agent Lightning's are in memory alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.ingest import at_once, provisioned
from services.local.embedded import PostgresServer
from services.local.processes import free_port

HOME = Path(".ratchet/bench")
SCRIPTS = Path(__file__).parent / "of_peers"
LIMIT_S = 900


@dataclass(frozen=True)
class Peer:
    name: str
    script: str
    wants: tuple[str, ...]
    keeps: str


PEERS = (
    Peer("mlflow", "mlflow_traces.py", ("mlflow==3.17.2", "psycopg[binary]"), "Postgres"),
    Peer(
        "phoenix",
        "phoenix_spans.py",
        ("arize-phoenix[pg]==20.26.1", "psycopg[binary]"),
        "Postgres, acknowledged before",
    ),
    Peer("agentlightning", "agentlightning_spans.py", ("agentlightning==0.3.0",), "memory alone"),
)


def installed(peer: Peer) -> Path:
    """The Python of a venv that has the peer."""
    home = HOME.absolute() / peer.name
    python = home / "bin" / "python"
    mark = home / "installed"
    if not mark.is_file() or mark.read_text() != str(peer.wants):
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *peer.wants], check=True, stderr=subprocess.DEVNULL)
        mark.write_text(str(peer.wants))
    return python


def measured(peer: Peer, events: int, size_bytes: int, postgres: PostgresServer, home: Path) -> dict[str, Any]:
    python = installed(peer)
    with psycopg.connect(postgres.url_of("postgres"), autocommit=True) as connection:
        connection.execute(f"create database {peer.name}")
    url = postgres.url_of(peer.name)
    environment = {
        **os.environ,
        "PHOENIX_SQL_DATABASE_URL": url,
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(free_port()),
        "PHOENIX_GRPC_PORT": str(free_port()),
        "PHOENIX_WORKING_DIR": str(home),
        "PHOENIX_TELEMETRY_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [str(python), str(SCRIPTS / peer.script), str(events), str(size_bytes), url]
    log = home / f"{peer.name}.log"
    with log.open("wb") as errors:
        done = subprocess.run(  # a failure is told with its log
            command, check=False, env=environment, stdout=subprocess.PIPE, stderr=errors, timeout=LIMIT_S
        )
    if done.returncode:
        raise SystemExit(f"{peer.name} ended with {done.returncode}: {log.read_text(errors='replace')[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "keeps": peer.keeps}


async def ours(events: int, size_bytes: int, home: Path) -> dict[str, Any]:
    async with provisioned(home / "ours") as (stage, pool):
        found = await at_once(stage, pool, events, size_bytes, 1)
        row = await pool.fetchrow("select count(*) as stored from bodies")
    lost = stage.acknowledged - row["stored"]
    return {
        "version": "this",
        "events": stage.acknowledged,
        "per_s": found["committed_per_s"],
        "lost": lost,
        "keeps": "NATS, then Postgres",
    }


def measure(events: int, size_bytes: int, home: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        progress.update(task, description=f"ratchet: {events} events")
        found["ratchet"] = asyncio.run(ours(events, size_bytes, home))
        postgres = PostgresServer(home / "postgres")
        postgres.start()
        try:
            for peer in PEERS:
                progress.update(task, description=f"{peer.name}: install where it is missing, {events // 4} spans")
                found[peer.name] = measured(peer, events // 4, size_bytes, postgres, home)
        finally:
            postgres.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=24_000, help="of ours; the peers get a quarter of them")
    parser.add_argument("--bytes", type=int, default=1024)
    options = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as directory:
        found = measure(options.events, options.bytes, Path(directory))
    table = Table(title=f"Events of {options.bytes} bytes recorded a second")
    for column in ("what", "version", "a second", "lost", "kept in"):
        table.add_column(column, justify="right" if column in ("a second", "lost") else "left")
    for name, row in sorted(found.items(), key=lambda item: -item[1]["per_s"]):
        table.add_row(name, row["version"], f"{row['per_s']:,}", str(row["lost"]), row["keeps"])
    Console(stderr=True).print(table)
    print(json.dumps({"event_bytes": options.bytes, **found}))


if __name__ == "__main__":
    main()

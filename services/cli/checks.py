"""What doctor checks, one function a part; each returns findings and raises nothing that it knows of."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from services.cli import store
from services.cli.launch import SERVICES
from services.terminal import session
from shared import subjects
from shared.errors import ConfigurationError, RatchetError

if TYPE_CHECKING:
    from services.terminal.settings import CliSettings
    from shared.bus import Bus
    from shared.database import Pool
    from shared.settings import Settings

Verdict = Literal["ok", "warn", "fail"]

MIN_PAYLOAD = 8 * 1024 * 1024
MIN_POSTGRES = 150_000
FULL = 0.8
GOOD_QUALITY, POOR_QUALITY = 0.95, 0.8
OTHER_VARIABLES = {"RATCHET_DEBUG", "RATCHET_TEST_DATABASE_URL"}


@dataclass(frozen=True)
class Finding:
    part: str
    verdict: Verdict
    detail: str
    mend: str | None = None


async def examine() -> list[Finding]:
    """Everything, in the order in which one would mend it."""
    from services.cli import gateway_checks, group_checks, judge_checks, loop_checks, training_checks

    found = configuration()
    running = {"unknown": "the broker is away"}
    try:
        settings = session.settings()
    except ConfigurationError:
        return found  # said above; nothing can be reached without it
    async with _broker(settings, found) as bus:
        if bus is not None:
            found += [server(bus), *await streams(bus), *await loop_checks.presence(bus)]
            running = await judge_checks.running(bus)
        found += artifacts_directory(settings)
        async with _database(settings, found) as pool:
            if pool is not None:
                found += await database(pool)
                if not any(f.part == "migrations" and f.verdict == "fail" for f in found):
                    found += [*await artifacts(pool, settings), await quality(pool), await group_checks.groups(pool)]
                    found += [*await gateway_checks.gateway(pool), *await loop_checks.waits(pool)]
                    found += [*await set_aside(pool), *await judge_checks.probes(pool, running)]
                    found += await training_checks.policies(bus, pool)
    return [*found, judge_checks.judge(running)]


# configuration ------------------------------------------------------------------------------------
def settings_classes() -> dict[str, type[Settings]]:
    """The settings of every service that is installed, by service name."""
    from shared.settings import Settings

    found: dict[str, type[Settings]] = {}
    for service in SERVICES:
        name = f"services.{service}.settings"
        if importlib.util.find_spec(f"services.{service}") is None or importlib.util.find_spec(name) is None:
            continue
        for item in vars(importlib.import_module(name)).values():
            if isinstance(item, type) and issubclass(item, Settings) and item.__module__ == name:
                found[service] = item
    return found


def configuration() -> list[Finding]:
    """Every service's settings load; every RATCHET_ variable is one that somebody reads."""
    from services.terminal.settings import CliSettings
    from shared.settings import load

    findings, known = [], set(OTHER_VARIABLES)
    kinds: dict[str, type[Settings]] = {**settings_classes(), "cli": CliSettings}
    for service, kind in kinds.items():
        known |= {f"RATCHET_{field.upper()}" for field in kind.model_fields}
        try:
            load(kind)
        except ConfigurationError as error:
            lacking = isinstance(error.__cause__, ValidationError) and error.__cause__.errors()[0]["type"] == "missing"
            verdict: Verdict = "warn" if lacking else "fail"  # a service that runs elsewhere has its secrets there
            findings.append(Finding("configuration", verdict, f"{service}: {error}", "set it as the message says"))
    for name in sorted(name for name in os.environ if name.startswith("RATCHET_") and name not in known):
        near = difflib.get_close_matches(name, known, 1)
        mend = f"did you mean {near[0]}?" if near else "unset it; .env.example lists those that are read"
        findings.append(Finding("configuration", "warn", f"{name} is set and nothing reads it", mend))
    if any(f.verdict == "fail" for f in findings):
        return findings
    return [Finding("configuration", "ok", f"{len(known) - len(OTHER_VARIABLES)} settings are known"), *findings]


# broker -------------------------------------------------------------------------------------------
@asynccontextmanager
async def _broker(settings: CliSettings, found: list[Finding]) -> AsyncIterator[Bus | None]:
    try:
        async with session.bus(settings) as bus:
            yield bus
    except RatchetError as error:
        found.append(Finding("broker", "fail", str(error), "start NATS, or `ratchet up`"))
        yield None


def server(bus: Bus) -> Finding:
    version, limit = bus.nc.connected_server_version, bus.nc.max_payload
    if limit < MIN_PAYLOAD:
        detail = f"max_payload is {limit:,} bytes; an event of the largest size would end the connection"
        return Finding("broker", "fail", detail, "set max_payload: 8MB in the server's configuration")
    if (version.major, version.minor) < (2, 12):
        detail = f"NATS {version.major}.{version.minor} has no atomic batches"
        return Finding("broker", "warn", detail, "use NATS 2.12 or newer")
    return Finding("broker", "ok", f"NATS {version.major}.{version.minor}, max_payload {limit:,} bytes")


async def streams(bus: Bus) -> list[Finding]:
    from nats.errors import Error as NatsError
    from nats.js.api import DiscardPolicy, RetentionPolicy
    from nats.js.errors import NotFoundError

    findings = []
    for stream in subjects.STREAMS:
        try:
            info = await bus.js.stream_info(stream.name)
        except NotFoundError:
            findings.append(Finding("streams", "fail", f"{stream.name} does not exist", "run `ratchet migrate`"))
            continue
        except (NatsError, TimeoutError) as error:
            findings.append(Finding("streams", "fail", f"JetStream did not answer: {error!r}", "enable JetStream"))
            break
        config, state = info.config, info.state
        full = state.bytes / config.max_bytes if config.max_bytes and config.max_bytes > 0 else 0.0
        if config.discard != DiscardPolicy.NEW or config.retention != RetentionPolicy.LIMITS or config.max_age:
            detail = f"{stream.name} may drop events: it must keep by limits, refuse when full, and know no age"
            findings.append(Finding("streams", "fail", detail, "run `ratchet migrate`"))
        elif full > FULL:
            detail = f"{stream.name} is {full:.0%} full; it refuses events when it is full"
            findings.append(Finding("streams", "warn", detail, "see whether its consumers lag; raise its size"))
        elif stream.name == "DEAD" and state.messages:
            detail = f"{state.messages} dead letters, each with its reason"
            findings.append(Finding("streams", "warn", detail, "read them: `ratchet dead`; nothing else purges them"))
    return findings or [
        Finding("streams", "ok", f"{', '.join(s.name for s in subjects.STREAMS)} refuse and never drop")
    ]


# database -----------------------------------------------------------------------------------------
@asynccontextmanager
async def _database(settings: CliSettings, found: list[Finding]) -> AsyncIterator[Pool | None]:
    try:
        async with session.database(settings) as pool:
            yield pool
    except RatchetError as error:
        found.append(
            Finding("database", "fail", str(error), "start Postgres, or `ratchet up`; see RATCHET_DATABASE_URL")
        )
        yield None


async def database(pool: Pool) -> list[Finding]:
    from shared.database import newest_migration

    about = await store.server(pool)
    version = f"Postgres {about['version'].split()[0]}, {about['size_bytes'] / 1024**2:,.0f} MiB"
    if about["version_number"] < MIN_POSTGRES:
        first = Finding("database", "fail", f"{version} is too old", "use Postgres 15 or newer")
    elif (about["fsync"], about["synchronous_commit"]) != ("on", "on"):
        detail = f"{version}: fsync {about['fsync']}, synchronous_commit {about['synchronous_commit']}"
        first = Finding("database", "fail", detail, "set both on: what is acknowledged must survive a power cut")
    else:
        first = Finding("database", "ok", f"{version}, fsync and synchronous commit on")
    at, newest = await store.migration(pool), newest_migration()
    if at == newest:
        return [first, Finding("migrations", "ok", f"at {at}, the newest")]
    detail = "the database has no schema" if at is None else f"the schema is at {at}, this version needs {newest}"
    return [first, Finding("migrations", "fail", detail, "run `ratchet migrate`")]


# artifacts ----------------------------------------------------------------------------------------
def artifacts_directory(settings: CliSettings) -> list[Finding]:
    directory = settings.artifacts_dir
    existing = next((path for path in (directory, *directory.absolute().parents) if path.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        detail = f"{directory} cannot be written: {error.strerror}"
        return [Finding("artifacts", "fail", detail, "make it writable, or set RATCHET_ARTIFACTS_DIR")]
    return []


async def artifacts(pool: Pool, settings: CliSettings) -> list[Finding]:
    """Every version that answers, and every base, is there and is what its hash says; in a bucket, by its size."""
    from shared.artifact_bucket import artifacts_of

    keeper, findings = artifacts_of(settings), list[Finding]()
    live = await store.live_artifacts(pool)
    for row in live:
        try:
            keeper.check(row["artifact_sha256"])
        except (RatchetError, OSError) as error:
            mend = "put the directory back from a copy, or `ratchet rollback`"
            findings.append(Finding("artifacts", "fail", f"{row['policy']} {row['version']}: {error}", mend))
    if findings:
        return findings
    said = f"{len(live)} live versions verified by their hash" if live else "no version is registered yet"
    return [Finding("artifacts", "ok" if live else "warn", said, None if live else "`ratchet base create` makes one")]


# data ---------------------------------------------------------------------------------------------
async def set_aside(pool: Pool) -> list[Finding]:
    """Rows that a service's sweep cannot handle, while the rest goes on: of each kind how many, and the first."""
    by_kind: dict[tuple[str, str], list[store.Row]] = {}
    for row in await store.set_aside(pool):
        by_kind.setdefault((row["service"], row["kind"]), []).append(row)
    return [_set_aside(rows) for rows in by_kind.values()]


def _set_aside(rows: list[store.Row]) -> Finding:
    first, others = rows[0], f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    detail = f"{first['service']}, {first['kind']} {first['key']}{others}, {first['count']} times: {first['reason']}"
    return Finding("set aside", "warn", detail, f"see the log of {first['service']}; it is tried again each minute")


async def quality(pool: Pool) -> Finding:
    """The newest closed windows; the worst of them gives the verdict, for one bad window trains a bad batch."""
    rows = await store.window_quality(pool)
    if not rows:
        return Finding(
            "data quality", "warn", "no window with runs has closed yet", "`ratchet simulate --close` makes one"
        )
    worst = min(rows, key=lambda row: float(row["quality"]))
    detail = f"{worst['quality']:.3f} at worst ({worst['window_id']}), of the {len(rows)} newest windows"
    if worst["quality"] >= GOOD_QUALITY:
        return Finding("data quality", "ok", detail)
    mend = "see its runs with `ratchet trajectory`: no call, empty prompts, steps that are missing, wrong times"
    return Finding("data quality", "warn" if worst["quality"] >= POOR_QUALITY else "fail", detail, mend)

"""Commands that show: status, windows, a trajectory, models, agents. None of them changes anything."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from services.terminal.output import AsJson, console, instant, print_json, printable, table
from shared.errors import ConfigurationError, GiveUpError, RatchetError

WAITS_SHOWN = 12
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="How many of the newest.")]


def status(as_json: AsJson = False) -> None:
    """Servers, services, how far behind they are, the versions that answer now, and what waits for what."""
    from services.terminal import session

    found = session.run(_status())
    if as_json:
        print_json(found)
    else:
        out = console()
        parts = [(p["part"], p["state"], p["detail"]) for p in found["parts"]]
        out.print(table("", ("part", "state", "detail"), parts, wrap=("detail",)))
        if found["services"]:
            columns: tuple[str, ...] = ("service", "state", "replicas", "since", "who")
            who = [tuple(one[k] for k in (*columns[:-1], "detail")) for one in found["services"]]
            out.print(table("Services", columns, who, right=("replicas",), wrap=("who",)))
        if found["consumers"]:
            columns = ("service", "consumer", "state", "behind", "in work", "redelivered")
            rows = [
                (c["service"], c["consumer"], c["verdict"], c["pending"], c["unacknowledged"], c["redelivered"])
                for c in found["consumers"]
            ]
            out.print(table("Consumers", columns, rows, right=columns[3:]))
        if found["versions"]:
            live = [(v["policy"], v["version"], v["state"], f"{v['share']:.0%}") for v in found["versions"]]
            out.print(table("Versions that answer", ("policy", "version", "state", "share"), live, right=("share",)))
        if waits := found["waits"][:WAITS_SHOWN]:
            columns = ("what", "waits for", "until", "since", "overdue")
            rows = [tuple(one[k.replace(" ", "_")] for k in columns) for one in waits]
            title = f"Waits, {len(waits)} of {len(found['waits'])}" if len(waits) < len(found["waits"]) else "Waits"
            out.print(table(title, columns, rows, wrap=columns[1:2]))
    if found["down"] or any(part["state"] == "away" for part in found["parts"]):
        raise typer.Exit(1)


async def _status() -> dict[str, Any]:
    from dataclasses import asdict

    from services.admin import service
    from services.admin.domain import Presence, down
    from services.admin.store import Store
    from services.admin.watch import watched
    from services.terminal import session

    settings = session.settings()
    parts: list[dict[str, str]] = []
    services: list[Presence] = []
    consumers: list[dict[str, Any]] = []
    versions: list[dict[str, Any]] = []
    waits: list[dict[str, Any]] = []

    def say(part: str, state: str, detail: str) -> None:
        parts.append({"part": part, "state": state, "detail": detail})

    try:
        async with session.bus(settings) as bus, session.database(settings) as pool:
            say("broker", "ok", session.without_password(settings.nats_url))
            say("database", "ok", session.without_password(settings.database_url.get_secret_value()))
            watch = await watched(bus)
            services, consumers = watch.services(), watch.consumers()
            store = Store(pool)
            versions = [row for row in await service.models(store) if row["share"] > 0]
            waits = await store.waits()
    except RatchetError as error:
        say("servers", "away", str(error))
    for part, url in (
        ("gateway", settings.gateway_url),
        ("admin", settings.admin_url),
        ("inference", settings.inference_url),
    ):
        if url:
            fault = await session.unhealthy(url)
            say(part, "away" if fault else "ok", fault or url)
    return {
        "parts": parts,
        "services": [asdict(one) for one in services],
        "down": [one.service for one in down(services)],
        "consumers": consumers,
        "versions": versions,
        "waits": waits,
    }


def windows(
    policy: Annotated[str | None, typer.Option("--policy", "-p", help="Readiness of this policy alone.")] = None,
    limit: Limit = 20,
    idle: Annotated[bool, typer.Option("--all", help="Idle windows too.")] = False,
    since: Annotated[str | None, typer.Option("--from", help="That start at this time or later, UTC.")] = None,
    until: Annotated[str | None, typer.Option("--to", help="That start before this time, UTC.")] = None,
    as_json: AsJson = False,
) -> None:
    """Windows with what is in them; then what failed, whether training is ready, and what is missing."""
    from services.terminal import session

    found = session.run(_windows(policy, limit, idle, instant("--from", since), instant("--to", until)))
    if as_json:
        print_json(found)
        return
    counts = ("runs", "groups", "scored", "ties", "small", "failed", "left out", "last")
    columns = ("window", "state", *counts, "outcomes", "rewarded", "late", "agents", "quality")
    rows = [
        (
            *(w[k] for k in ("window_id", "phase", "trajectories", "groups", "scored", "ties", "small", "failed")),
            *(sum(w[k].values()) for k in ("left_out", "ranked_last")),
            *(w[k] for k in ("outcomes", "rewarded", "late", "agents")),
            None if w["quality"] is None else f"{w['quality']:.0%}",
        )
        for w in found["windows"]
    ]
    console().print(table("", columns, rows, right=columns[2:]))
    for line in found["notes"]:
        typer.echo(printable(line))
    for readiness in found["readiness"]:
        typer.echo(printable(_readiness_line(readiness)))


def _readiness_line(readiness: dict[str, Any]) -> str:
    name = f"policy {readiness['policy']}"
    if readiness["ready"] is None:
        return f"{name}: readiness unknown: {readiness['fault']}"
    have = f"{readiness.get('groups', 0)} groups, {readiness.get('trajectories', 0)} trajectories"
    if readiness["ready"]:
        return f"{name}: ready to train on {have}"
    return f"{name}: not ready ({have}): {'; '.join(readiness.get('missing', [])) or 'no reason given'}"


async def _windows(
    policy: str | None, limit: int, idle: bool, since: datetime | None, until: datetime | None
) -> dict[str, Any]:
    from services.admin import service
    from services.admin.domain import lonely, notes, phase
    from services.admin.store import Store
    from services.cli import training
    from services.cli.store import failed_batches
    from services.terminal import session

    settings = session.settings()
    async with session.database(settings) as pool:
        store = Store(pool)
        rows = await store.windows(limit, idle=idle, since=since, until=until)
        policies = [policy] if policy else await store.policies()
        try:
            async with session.bus(settings) as bus:
                told = [await service.readiness(bus, name) for name in policies]
        except RatchetError as error:
            told = [service.unknown_readiness(name, error) for name in policies]
        readiness = [await training.with_reasons(pool, one) for one in told]
        failures = await failed_batches(pool, policy)
    of_windows = [f"{row['window_id']}: {'; '.join(said)}" for row in rows if (said := notes(row))]
    return {
        "windows": [{**row, "phase": phase(row)} for row in rows],
        "notes": [*of_windows, *filter(None, [lonely(rows)]), *training.notes(readiness, failures)],
        "readiness": readiness,
        "failed_batches": failures,
    }


def trajectory(
    trajectory_id: Annotated[str, typer.Argument(metavar="ID")],
    agent: Annotated[str | None, typer.Option("--agent", "-a", help="Whose run, where several have that id.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The exact bytes of each event, one a line.")] = False,
    as_json: AsJson = False,
) -> None:
    """One run as it was stored, what became of it, and the version that it helped to train."""
    from services.cli import show_run
    from services.terminal import session

    if raw and as_json:
        raise ConfigurationError("--raw and --json exclude each other; give one")
    found = session.run(_trajectory(trajectory_id, agent, raw=raw))
    if isinstance(found, list):
        show_run.raw(found)
    elif as_json:
        print_json(found)
    else:
        show_run.pretty(found)


async def _trajectory(trajectory_id: str, agent: str | None, *, raw: bool) -> dict[str, Any] | list[bytes]:
    from services.admin import runs
    from services.admin.store import Store
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        store = Store(pool)
        owners = [agent] if agent else await store.agents_of_run(trajectory_id)
        if len(owners) > 1:
            raise ConfigurationError(
                f"{len(owners)} agents have a run {trajectory_id}; choose with --agent: {', '.join(owners[:8])}"
            )
        document = await runs.document(store, owners[0], trajectory_id) if owners else None
        if document is None:
            of = f" of agent {agent}" if agent else ""
            raise GiveUpError(f"no run {trajectory_id!r}{of} is stored; `ratchet export` lists those that are")
        if not raw:
            return document
        events = await store.run_events(owners[0], trajectory_id)
        return [body for event in events if (body := runs.content(event)) is not None]


def models(
    policy: Annotated[str | None, typer.Option("--policy", "-p", help="Of this policy alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Versions: where each came from, where it stands, and the evidence for it."""
    from services.terminal import session
    from shared.upstream import in_words

    rows = session.run(_models(policy))
    if as_json:
        print_json(rows)
        return
    standing = ("policy", "version", "state", "share", "evidence", "runs", "reward")
    columns = (*standing, "parent", "method", "mismatch", "answers")
    cells = [
        (
            *(row[k] for k in ("policy", "version")),
            row["state"] or "registered",
            f"{row['share']:.0%}",
            evidence(row),
            row["runs"] or 0,
            row["mean_reward"],
            *(row[k] for k in ("parent", "method")),
            row["mismatch"],
            in_words(row["serving"]) if row["serving"] else row["artifact_sha256"][:12],
        )
        for row in rows
    ]
    console().print(table("", columns, cells, right=("share", "runs", "reward", "mismatch"), wrap=("evidence",)))


def evidence(row: dict[str, Any]) -> str:
    """Evidence in a line: the mean difference from its control, over how many windows; then the verdict's words."""
    said = row["reason"] or ""
    if not row["windows"]:
        return said or "-"
    measured = f"{row['difference']:+.3g} against {row['control'] or 'control'} in {row['windows']} windows"
    return f"{measured}; {said}" if said else measured


async def _models(policy: str | None) -> list[dict[str, Any]]:
    from services.admin import service
    from services.admin.store import Store
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        return await service.models(Store(pool), policy)


def agents(context: typer.Context, limit: Limit = 1000, as_json: AsJson = False) -> None:
    """The agents that were seen: since when, how many runs, with which versions."""
    if context.invoked_subcommand is not None:
        return
    from services.terminal import session

    rows = session.run(_agents(limit))
    if as_json:
        print_json(rows)
        return
    columns = ("agent", "first seen", "last seen", "runs", "versions")
    cells = [(r["agent_id"], r["first_seen"], r["last_seen"], r["runs"], ", ".join(r["versions"])) for r in rows]
    console().print(table("", columns, cells, right=("runs",), wrap=("versions",)))


async def _agents(limit: int) -> list[dict[str, Any]]:
    from services.admin.store import Store
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        return await Store(pool).agents(limit)

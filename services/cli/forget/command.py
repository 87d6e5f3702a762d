"""`ratchet forget`: what runs said is erased wherever it lies; that they were, and what became of them, stays."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.forget.rules import RunKey, Selection
from services.terminal.output import AsJson, console, instant, print_json, progress, table, task
from shared.errors import ConfigurationError, GiveUpError, RatchetError, RetryLaterError

if TYPE_CHECKING:
    from rich.progress import Progress

    from shared.bus import Bus
    from shared.database import Pool

AT_ONCE = 100  # runs in one command: one transaction of each service
COMMAND_S = 120.0
REWRITE_S = 290.0  # the broker lets a service answer for five minutes
STREAMS = ("STEPS", "OUTCOMES", "DEAD")
REWRITTEN = {
    "recorder": ["steps"],
    "outcome_tracker": ["outcomes"],
    "scorer": ["judgments", "look_scores", "judge_cache"],
}
WORDS = {
    "runs": "runs not forgotten before",
    "events": "events",
    "size_bytes": "bytes of events",
    "facts": "notes and knowledge about them",
    "explanations": "explanations of judgments, of their whole groups",
    "cached_judgments": "cached judgments",
    "left_out": "runs left out of groups that wait for their judgment",
    "steps": "messages of STEPS",
    "outcomes": "messages of OUTCOMES",
    "dead": "dead letters",
    "export_files": "exported files",
    "exported_runs": "runs in them",
}


def forget(
    agent: Annotated[str | None, typer.Option("--agent", "-a", help="Every run of this agent.")] = None,
    trajectory: Annotated[str | None, typer.Option("--trajectory", "-t", help="The run with this id.")] = None,
    before: Annotated[
        str | None, typer.Option("--before", help="Every run that began before: 2026-11-20, or with a time, UTC.")
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Kept with the tombstones.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    rewrite: Annotated[
        bool,
        typer.Option("--rewrite", help="Then rewrite the tables, so that their files forget too; they wait meanwhile."),
    ] = False,
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for what is not stored yet.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Erase what runs said: events, exports, cached judgments, dead letters. Tombstones and lineage stay.

    Several options narrow each other down. Safe to repeat, and to repeat after it was interrupted.
    """
    from services.terminal import session

    selection = selected(agent, trajectory, before)
    asks = not (dry_run or yes)
    if asks and (as_json or not sys.stdin.isatty()):
        raise ConfigurationError("there is nobody to ask; give --yes, or --dry-run to see what would go")
    if not asks:
        found = session.run(_look(selection) if dry_run else _forget(selection, reason, rewrite=rewrite, wait_s=wait))
    else:
        _say(session.run(_look(selection)), as_json=False)
        typer.confirm(f"Erase what the runs {selection.words()} said? It cannot be had back", abort=True)
        found = session.run(_forget(selection, reason, rewrite=rewrite, wait_s=wait))
    _say(found, as_json)
    if found["waiting"]:
        raise typer.Exit(1)


def selected(agent: str | None, trajectory: str | None, before: str | None) -> Selection:
    """Raises ConfigurationError where nothing is named, or no time is."""
    from services.cli.admitting import checked

    if agent is None and trajectory is None and before is None:
        raise ConfigurationError("say what to forget: --agent, --trajectory or --before, or several of them")
    return Selection(checked(agent) if agent is not None else None, trajectory, instant("--before", before))


async def _runs(pool: Pool, selection: Selection) -> list[RunKey]:
    """The runs that are meant. Raises ConfigurationError where one id is the run of several agents.

    A run that is named whole is meant even where it is not stored: streams may hold what could not be.
    """
    from services.cli.forget import store

    keys = await store.runs_named(pool, selection.agent_id, selection.trajectory_id, selection.before)
    owners = sorted({agent_id for agent_id, _ in keys})
    if selection.trajectory_id is not None and len(owners) > 1:
        raise ConfigurationError(
            f"{len(owners)} agents have a run {selection.trajectory_id}; choose with --agent: {', '.join(owners[:8])}"
        )
    if not keys and selection.agent_id is not None and selection.trajectory_id is not None:
        return [(selection.agent_id, selection.trajectory_id)]
    if not keys:
        raise GiveUpError(f"no run {selection.words()} is stored")
    return keys


def _parts(keys: Sequence[RunKey]) -> Iterator[Sequence[RunKey]]:
    return (keys[start : start + AT_ONCE] for start in range(0, len(keys), AT_ONCE))


# looking ------------------------------------------------------------------------------------------
async def _look(selection: Selection) -> dict[str, Any]:
    from services.cli.forget import exports, store
    from services.cli.forget import traces as forget_traces
    from services.terminal import session

    settings = session.settings()
    async with session.database(settings) as pool, session.bus(settings) as bus:
        keys = await _runs(pool, selection)
        counts: dict[str, int] = {}
        for part in _parts(keys):
            _add(counts, await store.traces(pool, part))
        for stream in STREAMS:
            looked = await forget_traces.erase(bus, stream, set(keys), selection, wait_s=0, only_look=True)
            counts[stream.lower()] = looked.messages
    files = exports.clean(set(keys), only_look=True)
    counts |= {"export_files": files.files, "exported_runs": files.runs}
    return _document(selection, keys, counts, dry_run=True, missing=files.missing)


# erasing ------------------------------------------------------------------------------------------
async def _forget(selection: Selection, reason: str | None, *, rewrite: bool, wait_s: float) -> dict[str, Any]:
    from services.terminal import session

    settings = session.settings()
    who = getpass.getuser()
    async with session.database(settings) as pool, session.bus(settings) as bus:
        keys = await _runs(pool, selection)
        request = {**selection.document(), "reason": reason, "runs": len(keys), "rewrite": rewrite}
        await bus.command("admin", "forgot", {"who": who, "request": {**request, "state": "begun"}})
        with progress() as bar:
            counts = await _erase_rows(bus, keys, who, reason, bar)
            found = await _erase_elsewhere(bus, selection, keys, counts, wait_s, bar)
            if rewrite:
                found["rewritten"] = await _rewrite(bus, pool, keys, bar)
        told = {key: value for key, value in found.items() if key not in ("selection", "missing")}
        await bus.command("admin", "forgot", {"who": who, "request": {**request, "state": "done"}, "reply": told})
    return found


async def _erase_rows(bus: Bus, keys: Sequence[RunKey], who: str, reason: str | None, bar: Progress) -> dict[str, int]:
    """Tombstones first: from then on nobody brings a word back, and the others only clear up."""
    counts = {
        "runs": 0,
        "events": 0,
        "size_bytes": 0,
        "facts": 0,
        "explanations": 0,
        "cached_judgments": 0,
        "left_out": 0,
    }
    for service in ("recorder", "outcome_tracker", "scorer"):
        advance = task(bar, f"erase, {service.replace('_', ' ')}", len(keys))
        for part in _parts(keys):
            runs = [{"agent_id": agent_id, "trajectory_id": trajectory_id} for agent_id, trajectory_id in part]
            request = {"runs": runs, "who": who, **({"reason": reason} if reason else {})}
            _add(counts, await _told(bus, service, "forget", request, COMMAND_S))
            advance(len(part))
    return counts


async def _told(bus: Bus, service: str, verb: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    try:
        return await bus.command(service, verb, request, timeout_s=timeout_s)
    except RatchetError as error:
        raise RetryLaterError(f"{error}; what is erased is erased: run the same command again for the rest") from error


async def _erase_elsewhere(
    bus: Bus, selection: Selection, keys: Sequence[RunKey], counts: dict[str, int], wait_s: float, bar: Progress
) -> dict[str, Any]:
    from services.cli.forget import exports
    from services.cli.forget import traces as forget_traces

    waiting = 0
    for stream in STREAMS:
        advance = task(bar, f"erase, stream {stream}", max(1, await forget_traces.mark(bus, stream)))
        erased = await forget_traces.erase(bus, stream, set(keys), selection, wait_s=wait_s, advance=advance)
        counts[stream.lower()] = erased.messages
        waiting += erased.waiting
    files = exports.clean(set(keys))
    counts |= {"export_files": files.files, "exported_runs": files.runs}
    return _document(selection, keys, counts, waiting=waiting, missing=files.missing)


async def _rewrite(bus: Bus, pool: Pool, keys: Sequence[RunKey], bar: Progress) -> list[str]:
    from services.cli.forget import store

    partitions: set[str] = set()
    for part in _parts(keys):
        partitions.update(await store.partitions_of(pool, part))
    wanted = {**REWRITTEN, "recorder": [*REWRITTEN["recorder"], *sorted(partitions)]}
    tables = [(service, name) for service, names in wanted.items() for name in names]
    advance = task(bar, "rewrite tables", len(tables))
    for service, name in tables:
        await _told(bus, service, "rewrite", {"table": name}, REWRITE_S)
        advance(1)
    return [name for _, name in tables]


# saying -------------------------------------------------------------------------------------------
def _add(counts: dict[str, int], more: dict[str, Any]) -> None:
    for key, value in more.items():
        counts[key] = counts.get(key, 0) + value


def _document(
    selection: Selection,
    keys: Sequence[RunKey],
    counts: dict[str, int],
    *,
    dry_run: bool = False,
    waiting: int = 0,
    missing: Sequence[str] = (),
) -> dict[str, Any]:
    """``missing``: exported files that are not where they were written."""
    head = {"selection": selection.document(), "dry_run": dry_run, "matching_runs": len(keys)}
    return {**head, **counts, "waiting": waiting, "missing": list(missing)}


def _say(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    title = "Would be erased" if found["dry_run"] else "Erased"
    rows = [(words, found[key]) for key, words in WORDS.items() if key in found]
    console().print(table(f"{title}, of {found['matching_runs']} runs", ("what", "count"), rows, right=("count",)))
    for file in found["missing"]:
        typer.echo(f"not where it was exported to, and not looked through: {file}")
    if found["waiting"]:
        typer.echo(f"{found['waiting']} messages are not taken in yet; run the same command again once they are")
    elif not found["dry_run"] and "rewritten" not in found:
        typer.echo("The tables' files keep the bytes until they are rewritten: --rewrite, or VACUUM FULL.")

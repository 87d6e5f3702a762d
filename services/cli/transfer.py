"""Commands that carry runs in and out: import, export, simulate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from services.terminal.output import AsJson, Policy, console, print_json, printable, progress, task
from shared.errors import ConfigurationError, GiveUpError

FORMATS = ("openai-chat", "groups")
Close = Annotated[
    bool, typer.Option("--close", help="Then close its window, and wait for that; not where others act in it.")
]


def import_(
    file: Annotated[Path, typer.Argument(help=".jsonl or .jsonl.gz, a conversation a line.")],
    form: Annotated[str, typer.Option("--format", help="openai-chat, or groups.")] = "openai-chat",
    policy: Annotated[
        str | None,
        typer.Option("--policy", "-p", help="The line of models; what a line says, or default, if not given."),
    ] = None,
    close: Close = False,
    as_json: AsJson = False,
) -> None:
    """Publish recorded conversations as step events, as their agents would have; all fall into one window.

    A line: task_id (the scenario), trial (the agent), messages, and, where known, reward and instruction; or what
    `ratchet export` wrote, in either format.
    """
    from services.terminal import session

    if form not in FORMATS:
        raise ConfigurationError(f"--format {form!r} is not known; choose {' or '.join(FORMATS)}")
    if policy is not None:
        _check_policy(policy)
    said, bad = session.run(_import(file, form, policy, close))
    for line, fault in bad:
        console(err=True).print(printable(f"{file}: line {line} skipped: {fault}"), markup=False, soft_wrap=True)
    _say(said, as_json)
    if bad:
        raise typer.Exit(1)


async def _import(
    file: Path, form: str, policy: str | None, close: bool
) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    from contextlib import AsyncExitStack

    from services.interchange import importing
    from services.interchange.reading import read_file
    from services.terminal import session

    settings = session.settings()
    lines = list(read_file(file, form))  # before anything is asked of the servers: a wrong file is the commoner fault
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(session.bus(settings))
        pool = await stack.enter_async_context(session.database(settings))
        at, window = await importing.moment(settings.window_s, pool)
        made = importing.plan(file, lines, policy, at)
        if close and (why := await importing.in_use(pool, [window.window_id])):
            raise GiveUpError(f"{why}; nothing was imported")
        bar = stack.enter_context(progress())
        await importing.publish(bus, made, task(bar, "publish", made.size))
        if close:
            keys = [(run.agent_id, run.trajectory_id) for run in made.runs]
            windows = await importing.until_stored(pool, keys, task(bar, "store", len(keys)))
            if why := await importing.in_use(pool, windows):  # they came while it ran
                raise GiveUpError(f"{why}; what was imported is there")
            await importing.close_windows(bus, pool, windows, task(bar, "close", len(windows)))
    facts = sum(len(run.facts) for run in made.runs)
    return {
        "import_id": str(made.shared.import_id),
        "window_id": window.window_id,
        "policy": ", ".join(sorted({run.started.policy for run in made.runs})),
        "runs": len(made.runs),
        "events": made.size - facts,
        "outcomes": facts,
        "skipped_lines": [line for line, _ in made.bad],
        "closed": close,
        "trajectories": [run.trajectory_id for run in made.runs],
    }, made.bad


def simulate(
    agents: Annotated[int, typer.Option("--agents", min=1, max=1000, help="How many agents.")] = 8,
    minutes: Annotated[float, typer.Option("--minutes", min=0.01, help="How long they act, in their own time.")] = 5.0,
    rate: Annotated[
        float, typer.Option("--rate", min=0.01, help="How much faster than the clock their time goes.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed, the same runs.")] = 0,
    policy: Policy = "default",
    close: Close = False,
    as_json: AsJson = False,
) -> None:
    """Agents that trade, post and comment, with varied luck, through the SDK; each acts once a minute."""
    from services.demo import simulated
    from services.terminal import session

    _check_policy(policy)
    plan = simulated.Plan(agents=agents, minutes=minutes, rate=rate, seed=seed, policy=policy)
    _say(session.run(simulated.simulate(plan, close=close)), as_json)


def export(
    form: Annotated[str, typer.Option("--format", help="groups (for ART) or openai-chat.")] = "groups",
    window: Annotated[str | None, typer.Option("--window", "-w", help="Of this window alone.")] = None,
    policy: Annotated[str | None, typer.Option("--policy", "-p", help="Of this policy alone.")] = None,
    ties: Annotated[bool, typer.Option("--ties", help="Groups without spread too; they teach nothing.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file, instead of stdout.")] = None,
    as_json: AsJson = False,
) -> None:
    """Scored groups or whole conversations as JSONL. --json adds a summary (on stderr beside stdout)."""
    from services.terminal import session

    if form not in FORMATS:
        raise ConfigurationError(f"--format {form!r} is not known; choose groups or openai-chat")
    lines = session.run(_export(form, window, policy, ties, out))
    if as_json:
        summary = {"format": form, "lines": lines, "file": None if out is None else str(out)}
        print_json(summary, err=out is None)
    elif out is not None:
        typer.echo(f"{lines} lines in {out}", err=True)


async def _export(form: str, window: str | None, policy: str | None, ties: bool, out: Path | None) -> int:
    import contextlib

    from services.cli.forget import exports
    from services.interchange import exporting, store
    from services.terminal import session

    count = 0
    async with session.database(session.settings()) as pool:
        if window is not None and not await store.window_exists(pool, window):
            raise ConfigurationError(f"there is no window {window!r}; `ratchet windows` lists them")
        states = ("scored", "tie") if ties else ("scored",)
        found = (
            exporting.groups(pool, window, policy, states)
            if form == "groups"
            else exporting.conversations(pool, window, policy)
        )
        if out is not None:
            exports.note(out, form)
        try:
            sink = contextlib.nullcontext(sys.stdout) if out is None else out.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"{out} cannot be written: {error.strerror}; give another --out") from error
        with sink as file:
            async for line in found:
                file.write(line + "\n")
                count += 1
    return count


def _check_policy(policy: str) -> None:
    import re

    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", policy):
        raise ConfigurationError(f"{policy[:80]!r} is no policy name; use 1 to 64 letters, digits, _ and -")


def _say(said: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(said)
        return
    for key, value in said.items():
        if not isinstance(value, list):
            typer.echo(f"{key.replace('_', ' ')}: {value}")

"""Commands that change something: each asks the owning service over ``command.*`` and prints what it said."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.terminal.output import AsJson, Policy, print_json, printable, shown
from shared.errors import ConfigurationError

Reason = Annotated[str | None, typer.Option("--reason", help="Kept with the decision.")]
Version = Annotated[str, typer.Argument(help="As `ratchet models` lists it, for instance v3.")]


def train(
    context: typer.Context,
    policy: Policy = "default",
    min_agents: Annotated[int | None, typer.Option(min=1, help="Agents that a batch needs at least.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    dropout: Annotated[float | None, typer.Option(min=0, max=0.99, help="Share of runs left out at random.")] = None,
    lookback: Annotated[int | None, typer.Option(min=1, help="Windows to take groups from.")] = None,
    window: Annotated[list[str] | None, typer.Option("--window", help="Made of this window; may be repeated.")] = None,
    groups: Annotated[list[str] | None, typer.Option("--groups", help="Made of this group; may be repeated.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Though a version is on trial, or one agent alone is heard.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended, with its progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask the trainer for a batch now, from what is judged and not yet trained on; or cancel the one that runs."""
    if context.invoked_subcommand is not None:
        return
    wanted: dict[str, Any] = {
        "policy": policy,
        "min_agents": min_agents,
        "iterations": iterations,
        "dropout": dropout,
        "lookback_windows": lookback,
        "windows": window or None,
        "groups": groups or None,
        "force": force or None,
    }
    reply = ask("trainer", "train", wanted)
    if reply.get("batch_id") is None:
        reply |= _left_out(policy)
    elif wait:
        from services.cli.training_wait import until_ended
        from services.terminal import session

        reply |= session.run(until_ended(reply["batch_id"]))
    say(reply, as_json)
    if reply.get("batch_id") is None:  # nothing was claimed, and the reply says what is missing
        raise typer.Exit(1)


def train_cancel(
    batch: Annotated[str | None, typer.Argument(help="As `ratchet batches` lists it; else the policy's own.")] = None,
    policy: Policy = "default",
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """End a batch that is being trained, within seconds. Its groups go back, and no run is to blame."""
    import getpass

    request = {"policy": policy, "batch_id": batch, "by": getpass.getuser(), "reason": reason}
    say(ask("trainer", "cancel", request), as_json)


def rescore(
    window: Annotated[str, typer.Argument(help="As `ratchet windows` lists it.")],
    judge: Annotated[str | None, typer.Option("--judge", help="outcome or ruler; the scorer's own by default.")] = None,
    rubric: Annotated[str | None, typer.Option("--rubric", help="Name and version, for instance ratchet/1.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until every group has its new judgment, or failed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge a window's groups anew. Older judgments stay, and what was trained on is not trained on again."""
    from services.cli.rescoring import until_judged
    from services.terminal import session

    if judge is not None and judge not in ("outcome", "ruler"):
        raise ConfigurationError(f"--judge {judge[:80]!r} is not known; choose outcome or ruler")
    reply = ask("scorer", "rescore", {"window_id": window, "judge": judge, "rubric": rubric})
    if wait:
        reply |= session.run(until_judged(window))
    say(reply, as_json)
    if reply.get("failed"):
        raise typer.Exit(1)


def deploy(
    policy: Annotated[str, typer.Argument(help="The line of models.")],
    version: Version,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Promote a version by hand: all runs that start in the next windows are its own."""
    say(ask("deployer", "deploy", {"policy": policy, "version": version, "reason": reason}), as_json)


def rollback(
    policy: Annotated[str, typer.Argument(help="The line of models.")],
    version: Annotated[str | None, typer.Argument(help="What to roll back; the newest by default.")] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Go back to the best version before. It needs no evidence."""
    say(ask("deployer", "rollback", {"policy": policy, "version": version, "reason": reason}), as_json)


def _left_out(policy: str) -> dict[str, Any]:
    """``left_out``, reason -> runs: what of the judged runs carries nothing; empty where the trainer has none."""
    from services.admin import service
    from services.terminal import session

    async def ask() -> dict[str, Any]:
        async with session.bus(session.settings()) as bus:
            return await service.readiness(bus, policy)

    counts = session.run(ask()).get("left_out")
    return {"left_out": counts} if counts else {}


def ask(service: str, verb: str, request: dict[str, Any]) -> dict[str, Any]:
    """What a service answers to a command; what is None is not sent."""
    from services.terminal import session

    given = {key: value for key, value in request.items() if value is not None}

    async def asked() -> dict[str, Any]:
        async with session.bus(session.settings()) as bus:
            return await bus.command(service, verb, given)

    return session.run(asked())


def say(reply: dict[str, Any], as_json: bool) -> None:
    """A service's answer, a line each."""
    if as_json:
        print_json(reply)
        return
    for key, value in reply.items():
        match value:
            case list():
                words = "; ".join(map(str, value))
            case {}:
                words = "; ".join(f"{name} ({shown(of)})" for name, of in value.items())
            case _:
                words = shown(value)
        typer.echo(printable(f"{key.replace('_', ' ')}: {words}"))

"""Commands that change something: each asks the owning service over ``command.*`` and prints what it said."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.terminal.output import AsJson, Policy, print_json, printable, shown
from shared.errors import ConfigurationError, GiveUpError

if TYPE_CHECKING:
    from services.terminal.settings import CliSettings

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
    reply = _command("trainer", "train", wanted)
    if reply.get("batch_id") is None:
        reply |= _left_out(policy)
    elif wait:
        from services.cli.training_wait import until_ended
        from services.terminal import session

        reply |= session.run(until_ended(reply["batch_id"]))
    _say(reply, as_json)
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
    _say(_command("trainer", "cancel", request), as_json)


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
    reply = _command("scorer", "rescore", {"window_id": window, "judge": judge, "rubric": rubric})
    if wait:
        reply |= session.run(until_judged(window))
    _say(reply, as_json)
    if reply.get("failed"):
        raise typer.Exit(1)


def deploy(
    policy: Annotated[str, typer.Argument(help="The line of models.")],
    version: Version,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Promote a version by hand: all runs that start in the next windows are its own."""
    _say(_command("deployer", "deploy", {"policy": policy, "version": version, "reason": reason}), as_json)


def rollback(
    policy: Annotated[str, typer.Argument(help="The line of models.")],
    version: Annotated[str | None, typer.Argument(help="What to roll back; the newest by default.")] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Go back to the best version before. It needs no evidence."""
    _say(_command("deployer", "rollback", {"policy": policy, "version": version, "reason": reason}), as_json)


def base_create(
    corpus: Annotated[Path, typer.Option("--corpus", help="Conversations as JSONL (.jsonl or .jsonl.gz).")],
    policy: Policy = "default",
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    note: Annotated[str | None, typer.Option(help="Kept with the version.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a small model whose tokenizer is learned from conversations, and register it as the policy's base."""
    from services.interchange.reading import read_file

    settings = _settings()
    rows = list(read_file(corpus))
    if bad := [row for row in rows if row.conversation is None]:
        raise GiveUpError(f"{corpus}: line {bad[0].line}: {bad[0].fault}; mend or remove it")
    messages = [row.conversation.messages for row in rows if row.conversation]
    if not messages:
        raise GiveUpError(f"{corpus} holds no conversation to learn a tokenizer from")
    from services.trainer.base import create_corpus_base

    with tempfile.TemporaryDirectory(prefix="ratchet-base-") as directory:
        create_corpus_base(messages, Path(directory), seed)
        said = note or f"made from {len(messages)} conversations of {corpus.name}, seed {seed}"
        _say(_register(settings, Path(directory), policy, said), as_json)


def base_register(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face model directory.")],
    policy: Policy = "default",
    note: Annotated[str | None, typer.Option(help="Kept with the version.")] = None,
    as_json: AsJson = False,
) -> None:
    """Take a model that is there already as the policy's base."""
    if not (directory / "config.json").is_file():
        raise ConfigurationError(f"{directory} is no Hugging Face model directory: it has no config.json")
    if not any(directory.glob("*.safetensors")):
        raise ConfigurationError(f"{directory} has no *.safetensors; save the model with safetensors")
    from services.trainer.chat_template import check

    lacks = check(directory)
    reply = _register(_settings(), directory, policy, note or f"registered from {directory.resolve().name}")
    _say(reply | ({"chat_template": lacks} if lacks else {}), as_json)


def _register(settings: CliSettings, directory: Path, policy: str, note: str) -> dict[str, Any]:
    from shared.artifacts import DirectoryStore

    artifact = DirectoryStore(settings.artifacts_dir).put(directory)
    reply = _command("trainer", "register_base", {"policy": policy, "artifact_sha256": artifact.sha256, "note": note})
    return {"policy": policy, **reply, "artifact_sha256": artifact.sha256, "size_bytes": artifact.size_bytes}


def _left_out(policy: str) -> dict[str, Any]:
    """``left_out``, reason -> runs: what of the judged runs carries nothing; empty where the trainer has none."""
    from services.admin import service
    from services.terminal import session

    async def ask() -> dict[str, Any]:
        async with session.bus(session.settings()) as bus:
            return await service.readiness(bus, policy)

    counts = session.run(ask()).get("left_out")
    return {"left_out": counts} if counts else {}


def _settings() -> CliSettings:
    from services.terminal import session

    return session.settings()


def _command(service: str, verb: str, request: dict[str, Any]) -> dict[str, Any]:
    from services.terminal import session

    given = {key: value for key, value in request.items() if value is not None}

    async def ask() -> dict[str, Any]:
        async with session.bus(session.settings()) as bus:
            return await bus.command(service, verb, given)

    return session.run(ask())


def _say(reply: dict[str, Any], as_json: bool) -> None:
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

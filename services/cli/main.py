"""`ratchet`: the list of commands, and what a user sees when one fails.

Exit codes: 0 done, 1 done but something was found wrong, 2 wrong input, 70 a bug, 75 try again later.
Nothing heavy is imported here, so that `ratchet --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli import (
    admitting,
    base,
    batches,
    change,
    dead,
    doctor,
    gateway_keys,
    judging,
    launch,
    observe,
    outcomes,
    runs,
    transfer,
    window,
)
from services.cli.forget.command import forget
from shared.errors import RatchetError, RetryLaterError

WRONG_INPUT, BUG, TRY_LATER, INTERRUPTED = 2, 70, 75, 130

app = typer.Typer(
    name="ratchet",
    help="Continuous reinforcement learning for LLM agents that are already running.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
agents = typer.Typer(help="The agents that were seen; their credentials and gateway keys.", rich_markup_mode=None)
training = typer.Typer(help="Ask for a batch now, or cancel the one that runs.", rich_markup_mode=None)
one_window = typer.Typer(help="One window: close it before its time.", no_args_is_help=True, rich_markup_mode=None)
letters = typer.Typer(
    help="What could never be handled, with its reason; show it, send it again.", rich_markup_mode=None
)
told = typer.Typer(help="What the world said of each window; fill past ones.", rich_markup_mode=None)


@app.callback()
def _chosen(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Of the installation that is meant; RATCHET_DIR, or .ratchet.")
    ] = None,
) -> None:
    if directory is not None:
        from services.local.state import turn_to

        turn_to(directory.absolute(), os.environ)


app.command()(launch.up)
app.command()(launch.demo)
app.command()(launch.run)
app.command()(launch.migrate)
app.command()(observe.status)
app.command()(observe.windows)
app.command()(runs.runs)
app.command()(batches.batches)
app.command()(observe.trajectory)
app.command()(observe.models)
app.add_typer(one_window, name="window")
one_window.callback()(window.one)
one_window.command()(window.close)
app.add_typer(agents, name="agents")
agents.callback(invoke_without_command=True)(observe.agents)
agents.command("key")(gateway_keys.agents_key)
agents.command("keys")(gateway_keys.agents_keys)
agents.command("revoke-key")(gateway_keys.agents_revoke_key)
agents.command("add")(admitting.agents_add)
agents.command("remove")(admitting.agents_remove)
app.command("import")(transfer.import_)
app.command()(transfer.export)
app.command()(transfer.simulate)
app.command()(forget)
app.add_typer(base.base, name="base")
app.add_typer(training, name="train")
training.callback(invoke_without_command=True)(change.train)
training.command("cancel")(change.train_cancel)
app.command()(change.rescore)
app.command()(change.deploy)
app.command()(change.rollback)
app.command()(doctor.doctor)
app.add_typer(told, name="outcomes")
told.callback(invoke_without_command=True)(outcomes.outcomes)
told.command()(outcomes.credential)
told.command()(outcomes.show)
told.command()(outcomes.sync)
app.add_typer(judging.judge, name="judge")
app.add_typer(letters, name="dead")
letters.callback(invoke_without_command=True)(dead.dead)
letters.command()(dead.show)
letters.command()(dead.replay)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; whatever goes wrong is one line on stderr."""
    try:
        code = app(args=list(arguments), prog_name="ratchet", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except RetryLaterError as error:
        return _fail(str(error), TRY_LATER)
    except RatchetError as error:
        return _fail(str(error), WRONG_INPUT)
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; pip install 'ratchet[embedded,train]'", WRONG_INPUT)
    except Exception as error:
        if (usage := _usage(error)) is not None:
            return usage
        if os.environ.get("RATCHET_DEBUG"):
            raise
        return _fail(
            f"a bug: {type(error).__name__}: {error}; set RATCHET_DEBUG=1 for the traceback, and please report it", BUG
        )


def _usage(error: Exception) -> int | None:
    """A command line that could not be parsed; help that was asked for by giving no command is no error."""
    if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
        return None
    context: Any = getattr(error, "ctx", None)
    message = str(error.format_message())
    if context is not None and message == context.get_help():
        typer.echo(message)
        return WRONG_INPUT
    command = context.command_path if context is not None else "ratchet"
    return _fail(f"{command}: {message} See `{command} --help`.", WRONG_INPUT)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    typer.echo(line if line.startswith("ratchet") else f"ratchet: {line}", err=True)
    return code


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

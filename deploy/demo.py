"""The profile `demo` of docker-compose.yml: a base model, then agents that trade against the composed services.

Registers the base, waits until it is served, trades for a number of windows, and ends with code 0 only if a version
that was trained here was promoted by its test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 120.0
Models = list[dict[str, Any]]


def command(*arguments: str) -> str:
    """What a command of this image prints. Raises CalledProcessError; its own words are on stderr already."""
    return subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def models() -> Models:
    found: Models = json.loads(command("services.cli.main", "models", "--json"))
    return found


def promoted(found: Models) -> list[str]:
    """Versions that were trained and passed their test; one that a later one replaced passed it too."""
    good = ("promoted", "superseded")
    return [model["version"] for model in found if model["method"] != "base" and model["state"] in good]


def wait_for(condition: Callable[[Models], bool]) -> Models:
    """The models once the condition holds, or as they are after two minutes."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition(found := models()) and time.monotonic() < deadline:
        time.sleep(1)
    return found


def say(text: str) -> None:
    sys.stdout.write(f"demo: {text}\n")
    sys.stdout.flush()


def main() -> int:
    seed = os.environ.get("RATCHET_DEMO_SEED", "1")
    windows = os.environ.get("RATCHET_DEMO_WINDOWS", "30")
    agents = os.environ.get("RATCHET_DEMO_AGENTS", "8")
    if not models():
        say("making the base model")
        directory = command("examples.market.base", "--cache", "/var/lib/ratchet/cache", "--seed", seed).strip()
        say(command("services.cli.main", "base", "register", directory, "--note", f"the market's base, seed {seed}"))
    wait_for(lambda found: any(model["state"] in ("promoted", "superseded") for model in found))
    say(f"{agents} agents trade for {windows} windows")
    with tempfile.TemporaryDirectory() as credentials:
        for number in range(int(agents)):
            name = f"trader-{number:02d}"
            command(
                "services.cli.main", "agents", "key", name, "--expires", "7d", "--file", f"{credentials}/{name}.key"
            )
        command("examples.market", "--windows", windows, "--credentials", credentials, "--seed", seed)
    found = wait_for(lambda found: bool(promoted(found)))  # the last window is not judged yet
    for model in found:
        say(f"{model['version']} ({model['method']}, from {model['parent'] or 'nothing'}): {model['state']}")
    better = promoted(found)
    say(f"the loop closed: {', '.join(better)} promoted" if better else "no version was promoted")
    return 0 if better else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        say(f"{' '.join(error.cmd[2:])} ended with code {error.returncode}")
        sys.exit(1)

"""``ratchet demo``: everything on this machine, a market with agents, and the loop closed before one's eyes.

What decides about success is fixed before the first window: their number, the shares, the tests, the measure.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.demo.progress import Watcher
from services.demo.screen import Screen
from services.local.agent_keys import issue_gateway_key, keep_gateway_key, kept_key
from services.local.broker import WORLD
from services.local.installation import MARKET_TIER, Installation, installation
from services.local.supervisor import Stopped
from shared.errors import ConfigurationError, RetryLaterError

if TYPE_CHECKING:
    from shared.bus import Bus

HOME = Path(".ratchet")
KEPT_DEMOS = 3
SABOTAGED = 2
POLICY = "default"
BASE_SHARE = 0.25
INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """What may be chosen. Nothing here changes once the first window has begun."""

    windows: int = 60
    agents: int = 12
    seed: int = 1
    window_s: int = 4
    judge: str = "outcome"
    share: float = 0.5
    sabotage: bool = False

    def settings(self) -> dict[str, str]:
        """The demo's settings: an hour's window in seconds, everything else in proportion."""
        numbers = {
            "WINDOW_S": self.window_s,
            "GRACE_S": 0.3,
            "TRAJECTORY_LIMIT_S": 3 * self.window_s,
            "TICK_S": 0.1,
            "SETTLE_MIN_S": 0.2,
            "SETTLE_MAX_S": 2 * self.window_s,
            "JUDGE": self.judge,
            "CANARY_SHARE": self.share,
            "BASE_SHARE": min(BASE_SHARE, round((1 - self.share) / 2, 4)),
            "ANCHOR_SHARE": 0.05 if self.share < 0.7 else 0.0,
            "DEADLINE_WINDOWS": max(20, self.windows // 3),
            "GROUP_MAX": max(8, min(self.agents, 16)),
            "MIN_GROUPS": 68,  # four windows of sixteen tickers and a question
            "TRAIN_STEPS": 24,
            "MINIBATCH": 256,  # with 64 and twice the rate, the order of the runs decided what was learned
            "LEARNING_RATE": 5e-4,
            "CLIP_EPSILON": 0.8,
            "TORCH_THREADS": 1,
            "TARGET_CONNECTIONS": 32,  # a burst of more is no faster on two cores, and each idle one is polled
            "REQUEST_TIMEOUT_S": 15,
            "LOG_LEVEL": "INFO",
        }
        if self.sabotage:
            numbers["SABOTAGE_VERSION"] = SABOTAGED
        return {f"RATCHET_{name}": str(value) for name, value in numbers.items()}


def demo(
    windows: int | None = None,
    agents: int | None = None,
    seed: int | None = None,
    window_s: int | None = None,
    judge: str | None = None,
    share: float | None = None,
    sabotage: bool = False,
    keep: bool = False,
    directory: Path | None = None,
    as_json: bool = False,
) -> int:
    """Run it and return the exit code: 0 only if the loop closed. ``keep`` spares this demo from being cleared away."""
    given = {"windows": windows, "agents": agents, "seed": seed, "window_s": window_s, "judge": judge, "share": share}
    options = Options(**{k: v for k, v in given.items() if v is not None}, sabotage=sabotage)  # type: ignore[arg-type]
    if options.share > 0.9:
        raise ConfigurationError(f"--share {options.share:g} leaves too little to compare with; 0.9 at most")
    home = directory or fresh_directory(HOME.absolute() / "demos")
    if keep:
        (home / "keep").touch()
    screen = Screen(options.windows, options.agents, quiet=as_json)
    return Story(options, home.absolute(), screen, as_json).run()


def fresh_directory(parent: Path) -> Path:
    """A new directory for this demo; older ones go, but the newest and those that were to be kept."""
    parent.mkdir(parents=True, exist_ok=True)
    free = sorted((old for old in parent.iterdir() if old.is_dir() and not (old / "keep").exists()), reverse=True)
    for old in free[KEPT_DEMOS - 1 :]:
        if not (old / "lock").exists():
            shutil.rmtree(old, ignore_errors=True)
    made = parent / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    made.mkdir()
    return made


class Story:
    """One demo from its first process to its report."""

    def __init__(self, options: Options, home: Path, screen: Screen, as_json: bool) -> None:
        self.options = options
        self.home = home
        self.screen = screen
        self.as_json = as_json
        self.began = time.monotonic()
        self.ended_early = False

    def run(self) -> int:
        settings = judge_settings() | self.options.settings()
        try:
            with (
                self.screen,
                installation(
                    self.home, settings, say=self.screen.say, inherit=False, first=self._begin_base
                ) as running,
            ):
                watcher = Watcher(running.environment["RATCHET_DATABASE_URL"], POLICY)
                try:
                    self._play(running, watcher)
                except Stopped:
                    self.ended_early = True
                    self.screen.say("ended early; the report shows what there is")
                return self._report(running, watcher)
        except Stopped:
            return INTERRUPTED

    def _play(self, running: Installation, watcher: Watcher) -> None:
        self.screen.phase("building the base model")
        base = self._built_base(running)
        self.screen.phase("registering it as v0")
        self._register(running, base)
        self._until_routed(running, watcher)
        self.screen.phase("agents trade")
        begin = self._start_market(running)
        self.screen.begin(begin, self.options.window_s)
        while running.supervisor.running("market"):
            self._look(running, watcher)
        self.screen.phase("the last windows are judged")
        deadline = time.monotonic() + 4 * self.options.window_s + 10
        while watcher.progress().measured < self.options.windows and time.monotonic() < deadline:
            self._look(running, watcher)

    def _look(self, running: Installation, watcher: Watcher) -> None:
        running.supervisor.wait(0.4)
        self.screen.show(watcher.progress(), running.supervisor.restarts)

    def _begin_base(self, running: Installation) -> None:
        """Build the base of this seed while the rest starts, in the cache beside all demos: once on a machine."""
        cache = HOME.absolute() / "cache"
        command = ("examples.market.base", "--cache", str(cache), "--seed", str(self.options.seed))
        running.supervisor.start(running.program("base", *command, ends=True), MARKET_TIER)

    def _built_base(self, running: Installation) -> Path:
        while running.supervisor.running("base"):
            running.supervisor.wait(0.1)
        return Path((running.directory / "logs" / "base.log").read_text().strip().splitlines()[-1])

    def _register(self, running: Installation, base: Path) -> None:
        from shared.artifacts import DirectoryStore

        artifact = DirectoryStore(Path(running.environment["RATCHET_ARTIFACTS_DIR"])).put(base)
        request = {"policy": POLICY, "artifact_sha256": artifact.sha256, "note": f"weak trader, {base.name}"}

        self._ask(running, lambda bus: bus.command("trainer", "register_base", request))

    def _ask(self, running: Installation, ask: Callable[[Bus], Coroutine[Any, Any, object]]) -> None:
        from shared.bus import Bus

        async def connected() -> None:
            bus = Bus(running.environment["RATCHET_NATS_URL"], name="demo")
            await bus.connect()
            try:
                await ask(bus)
            finally:
                await bus.close()

        asyncio.run(connected())

    def _until_routed(self, running: Installation, watcher: Watcher) -> None:
        deadline = time.monotonic() + 60
        while not any(version.share > 0 for version in watcher.progress().versions):
            if time.monotonic() > deadline:
                raise RetryLaterError(f"v0 was not routed within 60 s; see {running.directory / 'logs'}")
            running.supervisor.wait(0.2)

    def _start_market(self, running: Installation) -> float:
        """Start the market's process; returns when its first window begins, in seconds since 1970."""
        window_s = self.options.window_s
        begin = (math.floor((time.time() + 2.0) / window_s) + 1) * window_s
        options: dict[str, object] = {
            "--windows": self.options.windows,
            "--seed": self.options.seed,
            "--begin": begin,
            "--policy": POLICY,
            "--credentials": self._admit_traders(running),
        }
        command = ["examples.market", *(str(part) for pair in options.items() for part in pair)]
        program = running.program("market", *command, extra=running.as_user(WORLD), ends=True)
        running.supervisor.start(program, MARKET_TIER)
        return float(begin)

    def _admit_traders(self, running: Installation) -> Path:
        """Credentials for each trader, as `ratchet agents add` and `key` make them; returns their directory."""
        kept = running.directory / "agents"
        names = [f"trader-{number:02d}" for number in range(self.options.agents)]
        if running.broker is not None:
            running.broker.admit({name: kept_key(kept / f"{name}.nk") for name in names})

        async def issue(bus: Bus) -> None:
            for name in names:
                keep_gateway_key(kept / f"{name}.key", await issue_gateway_key(bus, name))

        self._ask(running, issue)
        return kept

    def _report(self, running: Installation, watcher: Watcher) -> int:
        from services.demo import report, report_facts

        self.screen.phase("writing the report")
        found = report_facts.gather(
            watcher,
            sabotaged=f"v{SABOTAGED}" if self.options.sabotage else None,
            options=self.options.__dict__,
            restarts=dict(running.supervisor.restarts),
            seconds=time.monotonic() - self.began,
        )
        report.write(found, self.home)
        for name in ("report.html", "report.png"):
            shutil.copyfile(self.home / name, Path.cwd() / name)
        self.screen.finish()
        report.tell(found, self.home, as_json=self.as_json)
        if self.ended_early:
            return INTERRUPTED
        return 0 if found.claim.closed else 1


def judge_settings() -> dict[str, str]:
    """The one thing that a demo takes from the environment: where a judge is. Which one judges, ``--judge`` says."""
    import os

    return {name: value for name, value in os.environ.items() if name.startswith("RATCHET_JUDGE_")}

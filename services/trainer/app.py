"""Composition root of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from services.trainer.batches import Batches, Wanted
from services.trainer.child import MakeEngine
from services.trainer.handlers import subscribe
from services.trainer.jobs import Jobs
from services.trainer.lines import Lines
from services.trainer.process import prepare
from services.trainer.readiness_domain import Conditions
from services.trainer.readings import Readings
from services.trainer.recipes import Recipes
from services.trainer.runs import StoredRuns
from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from services.trainer.store import Store
from services.trainer.tracker_wandb import WandbTracker
from shared import database
from shared.artifact_bucket import artifacts_of, files_of
from shared.aside import Aside
from shared.bus import Bus
from shared.database import Pool
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging

FILES_EVERY_S = 60.0


@dataclass(frozen=True)
class Parts:
    trainer: Trainer
    batches: Batches
    readings: Readings
    tracker: WandbTracker
    jobs: Jobs

    def tasks(self, settings: TrainerSettings) -> list[Periodic]:
        return [
            Periodic("train", 0.0, self.trainer.tick),  # it waits for its own tick, or until it is woken
            Periodic("read_runs", settings.sweep_s, self.readings.sweep),  # while it trains, too
            Periodic("announce_models", settings.sweep_s, self.trainer.announce_models),
            Periodic("log_batches", settings.sweep_s, self.tracker.sweep),
            Periodic("sweep_files", FILES_EVERY_S, self.jobs.sweep),
        ]


def making(settings: TrainerSettings) -> MakeEngine:
    """The engine that the settings name, for the process that trains: what it needs is imported there."""
    if settings.engine == "art":
        from services.trainer.engines.engine_art import art_engine

        return partial(
            art_engine,
            kind=settings.art_backend,
            project=settings.art_project,
            base_model=settings.art_base_model,
        )
    from services.trainer.engines.engine_torch import torch_engine

    return partial(torch_engine, device=settings.device, threads=settings.torch_threads)


PRELOADED = {"torch": "services.trainer.engines.preload_torch", "art": "services.trainer.engines.preload_art"}


def wanted(settings: TrainerSettings) -> Wanted:
    return Wanted(
        max_lag=settings.max_lag,
        imitation_min_reward=settings.imitation_min_reward,
        min_groups=settings.min_groups,
        min_agents=settings.min_agents,
        max_groups=settings.max_groups,
        recipes=recipes(settings),
        conditions=Conditions(
            settings.cool_down_s, settings.min_trajectories, settings.min_windows, settings.max_agent_share
        ),
        min_quality=settings.min_quality,
        trust_agent_tokens=settings.trust_agent_tokens,
    )


def recipes(settings: TrainerSettings) -> Recipes:
    numbers = {
        "learning_rate": settings.learning_rate,
        "steps": settings.train_steps,
        "minibatch": settings.minibatch,
        "imitation_minibatch": settings.imitation_minibatch,
        "clip_epsilon": settings.clip_epsilon,
        "max_grad_norm": settings.max_grad_norm,
        "micro_tokens": settings.micro_tokens,
        "trains": settings.trains,
        "lora_rank": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "dtype": settings.dtype,
    }
    return Recipes(numbers, settings.recipes)


def wire(settings: TrainerSettings, bus: Bus, pool: Pool, engine: MakeEngine) -> Parts:
    """All of the service on one bus and one pool, its subscriptions made and not yet started."""
    store, runs, artifacts = Store(pool), StoredRuns(pool), artifacts_of(settings)
    files = files_of(settings)
    readings = Readings(store, runs)
    batches = Batches(store, readings, wanted(settings), retry_s=settings.retry_s)
    jobs = Jobs(store, runs, artifacts, files(), settings.sabotage_version)
    trainer = Trainer(
        store,
        batches,
        readings,
        jobs,
        bus,
        artifacts,
        engine,
        files=files,
        lease_s=settings.lease_s,
        tick_s=settings.tick_s,
        retry_s=settings.retry_s,
        checkpoint_s=settings.checkpoint_s,
        aside=Aside("trainer", pool),
    )
    subscribe(bus, trainer, batches, Lines(store, artifacts, trainer.announce_models))
    tracker = WandbTracker(
        store, directory=settings.wandb_dir, mode=settings.wandb_mode, project=settings.wandb_project
    )
    return Parts(trainer, batches, readings, tracker, jobs)


async def main() -> None:
    settings = load(TrainerSettings)
    configure_logging("trainer", settings.log_level)
    prepare([PRELOADED[settings.engine]])
    url = settings.database_url.get_secret_value()
    async with database.pool(url, pool_size=settings.database_pool, application="trainer") as pool:
        bus = Bus(settings.nats_url, name="trainer")
        parts = wire(settings, bus, pool, making(settings))
        await serve("trainer", settings, bus, pool=pool, tasks=parts.tasks(settings))


def run() -> None:
    run_service(main)

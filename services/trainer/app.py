"""Composition root of the trainer."""

from __future__ import annotations

from dataclasses import dataclass

from services.trainer.batches import Batches, Wanted
from services.trainer.handlers import subscribe
from services.trainer.readings import Readings
from services.trainer.runs import StoredRuns
from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from services.trainer.store import Store
from services.trainer.tracker_wandb import WandbTracker
from services.trainer.training import Engine
from shared import database
from shared.artifacts import DirectoryStore
from shared.aside import Aside
from shared.bus import Bus
from shared.database import Pool
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging


@dataclass(frozen=True)
class Parts:
    trainer: Trainer
    batches: Batches
    readings: Readings
    tracker: WandbTracker

    def tasks(self, settings: TrainerSettings) -> list[Periodic]:
        return [
            Periodic("train", 0.0, self.trainer.tick),  # it waits for its own tick, or until it is woken
            Periodic("read_runs", settings.sweep_s, self.readings.sweep),  # while it trains, too
            Periodic("announce_models", settings.sweep_s, self.trainer.announce_models),
            Periodic("log_batches", settings.sweep_s, self.tracker.sweep),
        ]


def engine(settings: TrainerSettings) -> Engine:
    """The engine that the settings name; what it needs is imported only then."""
    if settings.engine == "art":
        from services.trainer.engines.engine_art import ArtEngine, backend_of

        return ArtEngine(
            lambda: backend_of(settings.art_backend), project=settings.art_project, base_model=settings.art_base_model
        )
    from services.trainer.engines.engine_torch import TorchEngine

    return TorchEngine(device=settings.device)


def wanted(settings: TrainerSettings) -> Wanted:
    return Wanted(
        max_lag=settings.max_lag,
        imitation_min_reward=settings.imitation_min_reward,
        min_groups=settings.min_groups,
        min_agents=settings.min_agents,
        max_groups=settings.max_groups,
        imitation_minibatch=settings.imitation_minibatch,
        trust_agent_tokens=settings.trust_agent_tokens,
        numbers={
            "learning_rate": settings.learning_rate,
            "steps": settings.train_steps,
            "minibatch": settings.minibatch,
            "clip_epsilon": settings.clip_epsilon,
            "max_grad_norm": settings.max_grad_norm,
            "micro_tokens": settings.micro_tokens,
            "trains": settings.trains,
            "lora_rank": settings.lora_rank,
            "lora_alpha": settings.lora_alpha,
            "dtype": settings.dtype,
        },
    )


def wire(settings: TrainerSettings, bus: Bus, pool: Pool, engine: Engine) -> Parts:
    """All of the service on one bus and one pool, its subscriptions made and not yet started."""
    store, runs = Store(pool), StoredRuns(pool)
    readings = Readings(store, runs)
    batches = Batches(store, readings, wanted(settings), retry_s=settings.retry_s)
    trainer = Trainer(
        store,
        batches,
        readings,
        runs,
        bus,
        DirectoryStore(settings.artifacts_dir),
        engine,
        lease_s=settings.lease_s,
        tick_s=settings.tick_s,
        retry_s=settings.retry_s,
        sabotage_version=settings.sabotage_version,
        aside=Aside("trainer", pool),
    )
    subscribe(bus, trainer, batches)
    tracker = WandbTracker(
        store, directory=settings.wandb_dir, mode=settings.wandb_mode, project=settings.wandb_project
    )
    return Parts(trainer, batches, readings, tracker)


async def main() -> None:
    settings = load(TrainerSettings)
    configure_logging("trainer", settings.log_level)
    if settings.engine == "torch":
        import torch

        torch.set_num_threads(settings.torch_threads)
    url = settings.database_url.get_secret_value()
    async with database.pool(url, pool_size=settings.database_pool, application="trainer") as pool:
        bus = Bus(settings.nats_url, name="trainer")
        parts = wire(settings, bus, pool, engine(settings))
        await serve("trainer", settings, bus, pool=pool, tasks=parts.tasks(settings))


def run() -> None:
    run_service(main)

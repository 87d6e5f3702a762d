"""Every subject, stream and durable consumer, in one place: the map of who hears what."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = "steps.>"  # what agents say of themselves
CALLS = "calls.>"  # what the gateway saw of them: only its own user may publish there
OUTCOMES = "outcomes.>"
WINDOW_CLOSED = "window.closed"
WINDOW_RESOLVED = "window.resolved"
GROUP_SCORED = "group.scored"
TRAINING_PROGRESS = "training.progress"
MODEL_TRAINED = "model.trained"
MODEL_DEPLOYED = "model.deployed"
MODEL_ROLLED_BACK = "model.rolled_back"
GATEWAY_HEALTH = "gateway.health"
ROUTES_BUCKET = "routes"
KEYS_BUCKET = "gateway_keys"


def steps(agent_id: str) -> str:
    return f"steps.{agent_id}"


def calls(agent_id: str) -> str:
    return f"calls.{agent_id}"


def outcomes(source: str) -> str:
    return f"outcomes.{source}"


def command(service: str, verb: str) -> str:
    return f"command.{service}.{verb}"


def ready(service: str, replica: str | None = None) -> str:
    """Where every replica of a service, or one, is asked on core NATS whether it can do its work."""
    return f"ready.{service}" if replica is None else f"ready.{service}.{replica}"


@dataclass(frozen=True)
class Stream:
    name: str
    subjects: tuple[str, ...]


@dataclass(frozen=True)
class Consumer:
    """A durable pull consumer; ``ack_wait_s`` is the time one message may be worked on.

    ``subject`` is what it is given of its stream: ``>`` is all of it.
    """

    stream: str
    durable: str
    subject: str
    ack_wait_s: float = 30.0
    max_ack_pending: int = 1000


STREAMS = (
    Stream("STEPS", (STEPS, CALLS)),
    Stream("OUTCOMES", (OUTCOMES,)),
    Stream("LOOP", ("window.*", "group.*", "training.*", "model.*")),
    Stream("DEAD", ("dead.>",)),
)

RECORDER_STEPS = Consumer("STEPS", "recorder", ">", max_ack_pending=20_000)
TRACKER_OUTCOMES = Consumer("OUTCOMES", "outcome_tracker", OUTCOMES, max_ack_pending=20_000)
TRACKER_CLOSED = Consumer("LOOP", "outcome_tracker_window_closed", WINDOW_CLOSED)
SCORER_RESOLVED = Consumer("LOOP", "scorer_window_resolved", WINDOW_RESOLVED, ack_wait_s=300.0)
TRAINER_SCORED = Consumer("LOOP", "trainer_group_scored", GROUP_SCORED)
DEPLOYER_TRAINED = Consumer("LOOP", "deployer_model_trained", MODEL_TRAINED, ack_wait_s=120.0)
DEPLOYER_RESOLVED = Consumer("LOOP", "deployer_window_resolved", WINDOW_RESOLVED)

CONSUMERS = (
    RECORDER_STEPS,
    TRACKER_OUTCOMES,
    TRACKER_CLOSED,
    SCORER_RESOLVED,
    TRAINER_SCORED,
    DEPLOYER_TRAINED,
    DEPLOYER_RESOLVED,
)

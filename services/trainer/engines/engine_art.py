"""ART (openpipe-art 0.5.18) as the engine: W&B Serverless, or LocalBackend on GPUs. Imported only where it is chosen.

A version is a LoRA checkpoint that ART keeps under the name ``<policy>-<version>``. Each batch trains a model of its
own, forked from its parent's, so that a version that was rolled back is nobody's parent; ``art.json`` in the artifact
says where ART keeps it. ART makes advantages itself, centring the rewards of a group; it is given our advantages as
rewards, and told not to scale them.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

from services.trainer.domain import CallRecord
from services.trainer.learning.sequences import Conversation, conversations
from services.trainer.training import Episode, Job, Progress, Trained
from shared.errors import GiveUpError
from shared.telemetry import logger

PLACE = "art.json"
ASK_AGAIN_S = 1.0
T = TypeVar("T")

CARD = """\
---
tags: [ratchet, art, {method}]
---
# {policy} {version}

Trained by ART from {parent} of the policy `{policy}` with {method}, batch `{batch}`, {runs} runs. `art.json` says where
ART keeps the checkpoint; the files beside it are its LoRA weights.
"""


def backend_of(kind: Literal["serverless", "local"]) -> Any:
    """ART's own backend. Raises GiveUpError where ART is not installed."""
    try:
        from art.local import LocalBackend
        from art.serverless import ServerlessBackend
    except ImportError as error:
        raise GiveUpError(f"engine art needs openpipe-art; pip install 'ratchet[art]' ({error})") from error
    return LocalBackend() if kind == "local" else ServerlessBackend()


def art_engine(
    checkpoints: object, *, kind: Literal["serverless", "local"], project: str, base_model: str
) -> ArtEngine:
    """The engine of a process of its own; ART keeps checkpoints itself."""
    return ArtEngine(lambda: backend_of(kind), project=project, base_model=base_model)


class ArtEngine:
    def __init__(self, make_backend: Callable[[], Any], *, project: str, base_model: str) -> None:
        self._make_backend = make_backend
        self._project = project
        self._base_model = base_model

    def train(self, job: Job, directory: Path, progress: Progress) -> Trained:
        if job.sabotage:
            raise GiveUpError("the fire drill changes weights itself; it needs the torch engine")
        return asyncio.run(self._train(job, directory, progress))

    async def _train(self, job: Job, directory: Path, progress: Progress) -> Trained:
        import art

        groups = trajectory_groups(job.episodes)
        backend = self._make_backend()
        try:
            with tempfile.TemporaryDirectory(prefix="ratchet-art-") as logs:
                model = art.TrainableModel(
                    name=f"{job.policy}-{job.version}",
                    project=self._project,
                    base_model=self._base_model,
                    base_path=logs,
                )
                await model.register(backend)
                await self._fork(backend, model, job.parent)
                before = await backend._get_step(model)
                metrics = await _watched(self._run(backend, model, groups, job), progress, job.recipe.steps)
                step = await backend._get_step(model)
                if step <= before:
                    raise GiveUpError(f"ART made no step of batch {job.batch_id}: {metrics}")
                await backend._experimental_pull_model_checkpoint(model, step=step, local_path=str(directory))
        finally:
            await backend.close()
        place = {"project": self._project, "name": model.name, "step": step, "base_model": self._base_model}
        (directory / PLACE).write_text(json.dumps(place, sort_keys=True))
        card = CARD.format(
            method=job.method,
            policy=job.policy,
            version=job.version,
            parent=job.parent_version,
            batch=job.batch_id,
            runs=len(job.episodes),
        )
        (directory / "README.md").write_text(card)
        progress(1, 1, metrics)
        return Trained({**metrics, "curve": [metrics]})

    async def _fork(self, backend: Any, model: Any, parent: Path) -> None:
        """Begin at the parent's checkpoint; a base that ART has never trained has none."""
        place = parent / PLACE
        if not place.exists():
            return
        known = json.loads(place.read_text())
        if known["base_model"] != self._base_model:
            raise GiveUpError(
                f"the parent was trained from {known['base_model']}, RATCHET_ART_BASE_MODEL says {self._base_model}"
            )
        await backend._experimental_fork_checkpoint(
            model, from_model=known["name"], from_project=known["project"], not_after_step=known["step"]
        )

    async def _run(self, backend: Any, model: Any, groups: Sequence[Any], job: Job) -> dict[str, float]:
        from art import TrainSFTConfig

        given = job.recipe.learning_rate
        rate = {} if given is None else {"learning_rate": given}  # else ART's own, of what it trains
        if job.method == "imitation":
            runs = [trajectory for group in groups for trajectory in group]
            await model.train_sft(runs, TrainSFTConfig(**rate))
            return {"trajectories": float(len(runs))}
        if not any(len({trajectory.reward for trajectory in group}) > 1 for group in groups):
            raise GiveUpError(f"no group of batch {job.batch_id} has spread; ART would make a step of noise")
        result = await backend.train(model, groups, **rate, scale_rewards=False)
        try:
            await model.log(groups, metrics=result.metrics, step=result.step, split="train")
        except Exception as error:  # the step is made: a log that fails must not have it made again
            logger().warning("art_log_failed", batch=job.batch_id, error=f"{type(error).__name__}: {error}")
        return {key: float(value) for key, value in result.metrics.items()}


async def _watched(work: Awaitable[T], progress: Progress, steps: int) -> T:
    """The result of ``work``, which is given up when ``progress`` raises: the lease is looked at meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=ASK_AGAIN_S))[0]:
            progress(0, steps, {})
    except BaseException:
        task.cancel()
        raise
    return task.result()


def trajectory_groups(episodes: Sequence[Episode]) -> list[Any]:
    """``art.TrajectoryGroup`` objects, built from trajectories: validating a group's JSON gives an empty one."""
    import art

    ordered = sorted(episodes, key=lambda episode: (episode.group_id, episode.agent_id, episode.trajectory_id))
    return [
        art.TrajectoryGroup([trajectory(episode) for episode in members], metadata={"group_id": group_id})
        for group_id, members in groupby(ordered, key=lambda episode: episode.group_id)
    ]


def trajectory(episode: Episode) -> Any:
    """A run as ``art.Trajectory``: what the agent's model said are choices, all else are messages."""
    import art

    histories = [
        art.trajectories.History(messages_and_choices=_mixed(talk, episode.calls), tools=talk.tools)
        for talk in conversations(episode.calls)
    ]
    first, *others = histories
    return art.Trajectory(
        messages_and_choices=first.messages_and_choices,
        tools=first.tools,
        additional_histories=others,
        reward=episode.advantage,
        metrics={"score": episode.score},
        metadata={"agent_id": episode.agent_id, "trajectory_id": episode.trajectory_id, "label": episode.label},
    )


def _mixed(talk: Conversation, calls: Sequence[CallRecord]) -> list[Any]:
    """Messages, and a choice where a recorded call of the run made them."""
    made = {len(call.messages): call for call in calls if talk.messages[: len(call.messages)] == tuple(call.messages)}
    return [choice(made[index]) if index in talk.own else message for index, message in enumerate(talk.messages)]


def choice(call: CallRecord) -> Any:
    """The recorded reply as an OpenAI ``Choice``; its tokens by id, since ART reads them back from their names."""
    from openai.types.chat.chat_completion import Choice

    response: dict[str, Any] = {"index": 0, "finish_reason": "stop", **(call.response or {})}
    if call.has_exact_tokens():
        content: list[dict[str, Any]] = [
            {"token": f"token_id:{token}", "logprob": logprob, "bytes": None, "top_logprobs": []}
            for token, logprob in zip(call.token_ids or [], call.logprobs or [], strict=True)
        ]
        response["logprobs"] = {"content": content, "refusal": None}
    else:
        response["logprobs"] = None
    return Choice.model_validate(response)

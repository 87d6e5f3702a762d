"""For agents that were written against a trajectory logger with ids instead of objects: the same calls, our events.

    logger = TrajectoryRecorder(recorder)
    trajectory_id = logger.start_trajectory(scenario_id="ticket-4711")
    step_id = logger.start_step(trajectory_id, {"balance": 100})
    logger.log_provider_access(step_id, provider_name="prices", data={...}, purpose="decide")
    logger.log_llm_call(step_id, model="m", system_prompt="...", user_prompt="...", response="buy")
    logger.complete_step(trajectory_id, step_id, action_type="buy", parameters={...}, success=True)
    logger.end_trajectory(trajectory_id, "completed", final_balance=101)

A step may also be named by its trajectory's id: the one that is open is meant. An id that is not known is counted among
the refused and said in the log, like everything that cannot be recorded. New code is better off with ``Recorder``.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from ratchet_sdk.recorder import Recording
from ratchet_sdk.run import Run, Status
from ratchet_sdk.step import RunStep

FINAL = "final_"
PURPOSES = ("action", "reasoning", "evaluation", "response")
STATUSES: dict[str, Status] = {
    "completed": "completed",
    "success": "completed",
    "failed": "failed",
    "error": "failed",
    "timeout": "truncated",
    "terminated": "truncated",
    "truncated": "truncated",
}


class TrajectoryRecorder:
    """Keeps the open runs of one agent by their ids."""

    def __init__(self, recorder: Recording) -> None:
        self._recorder = recorder
        self._runs: dict[str, Run] = {}
        self._steps: dict[str, RunStep] = {}  # the open one, by the id of its trajectory

    def start_trajectory(
        self,
        *,
        scenario_id: str | None = None,
        goal: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        expects: Iterable[str] = (),
        trajectory_id: str | None = None,
        **more: Any,
    ) -> str:
        """Returns the trajectory's id. What else is given (batch, group, episode) goes into the metadata."""
        data = dict(more)
        with self._recorder.harmless("a trajectory's metadata"):
            data.update({} if metadata is None else metadata)
        run = self._recorder.trajectory(
            scenario_id=scenario_id, goal=goal, metadata=data, expects=expects, trajectory_id=trajectory_id
        ).start()
        self._runs[run.trajectory_id] = run
        return run.trajectory_id

    def start_step(self, trajectory_id: str, environment: Mapping[str, Any] | None = None) -> str:
        """Returns the step's id. A step that is still open is recorded as it is."""
        run = self._run(trajectory_id)
        if run is None:
            return "-"
        if open_step := self._steps.pop(trajectory_id, None):
            open_step.leave()
        step = self._steps[trajectory_id] = run.step(environment)
        return f"{trajectory_id}/{step.number}"

    def log_provider_access(
        self,
        step_id: str,
        *,
        provider_name: str,
        data: Mapping[str, Any],
        purpose: str | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> None:
        if step := self._step(step_id):
            step.provider_access(provider_name, query=query, purpose=purpose, data=data)

    def log_llm_call(
        self,
        step_id: str,
        *,
        model: str,
        system_prompt: str | None,
        user_prompt: str,
        response: str,
        purpose: str = "action",
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
        messages: list[Any] | None = None,
        **more: Any,
    ) -> str | None:
        """Returns the call's id. ``more``: action_type, model_version, temperature, max_tokens, top_p, latency_ms."""
        step = self._step(step_id)
        if step is None:
            return None
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        with self._recorder.harmless("a LlmCall"):
            opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
            return step.llm_call(
                messages=messages or [*opening, {"role": "user", "content": user_prompt}],
                response=response,
                model=model,
                purpose=self._known("purpose", purpose, PURPOSES) or "action",
                usage={name: count for name, count in usage.items() if count is not None} or None,
                **more,
            )
        return None

    def complete_step(
        self,
        trajectory_id: str,
        step_id: str | None = None,
        *,
        action_type: str,
        parameters: Mapping[str, Any] | None = None,
        success: bool | None = None,
        result: Any = None,
        error: str | None = None,
        reasoning: str | None = None,
        reward: float | None = None,
    ) -> None:
        """The step's action, and its end: it is recorded."""
        step = self._step(trajectory_id if step_id is None else step_id)
        if step is None:
            return
        step.action(
            action_type, parameters=parameters, success=success, result=result, error=error, reasoning=reasoning
        )
        if reward is not None:
            step.reward(reward)
        step.leave()
        self._steps.pop(step.run.trajectory_id, None)

    def end_trajectory(
        self,
        trajectory_id: str,
        status: str = "completed",
        metrics: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Ends the run. ``final_balance=`` and the like are its final state, what else is given is a metric."""
        run = self._run(trajectory_id)
        if run is None:
            return
        del self._runs[trajectory_id]
        if open_step := self._steps.pop(trajectory_id, None):
            open_step.leave()
        run.final({name.removeprefix(FINAL): value for name, value in more.items() if name.startswith(FINAL)})
        run.metrics({k: v for k, v in more.items() if not k.startswith(FINAL)})
        run.metrics(metrics)
        run.end(STATUSES[self._known("status", status, STATUSES) or "failed"])

    def _known(self, what: str, given: Any, known: Container[str]) -> str | None:
        """``given``, or None, counted, where the wire contract has no word for it."""
        if isinstance(given, str) and given in known:
            return given
        self._recorder.refuse(f"the {what} {_named(given)} is not known, and was replaced")
        return None

    def _run(self, trajectory_id: str) -> Run | None:
        run = self._runs.get(trajectory_id) if isinstance(trajectory_id, str) else None
        if run is None:
            self._recorder.refuse(f"no trajectory {_named(trajectory_id)} is open")
        return run

    def _step(self, step_id: str) -> RunStep | None:
        step = None
        if isinstance(step_id, str):
            trajectory_id, _, number = step_id.rpartition("/") if "/" in step_id else (step_id, "", "")
            step = self._steps.get(trajectory_id)
        if step is None or number not in ("", str(step.number)):
            self._recorder.refuse(f"no step {_named(step_id)} is open")
            return None
        return step


def _named(given: Any) -> str:
    return repr(given[:200]) if isinstance(given, str) else f"of type {type(given).__name__}"

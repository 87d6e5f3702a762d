"""What each service is told of runs that are to be forgotten, and the reason that stands where they are left out."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field
from ratchet_sdk.events import AgentId, RunId

MAX_RUNS = 500  # in one command: it is one transaction of its service
LEFT_OUT = "its events were forgotten"


class NamedRun(BaseModel):
    agent_id: AgentId
    trajectory_id: RunId


class ForgetRuns(BaseModel):
    """``command.<service>.forget``: may be repeated; what is gone already is counted as nothing."""

    runs: Annotated[list[NamedRun], Field(min_length=1, max_length=MAX_RUNS)]
    who: Annotated[str, Field(min_length=1, max_length=200)] = "operator"
    reason: Annotated[str, Field(max_length=500)] | None = None

    @property
    def keys(self) -> list[tuple[str, str]]:
        return [(run.agent_id, run.trajectory_id) for run in self.runs]


class RewriteTable(BaseModel):
    """``command.<service>.rewrite``: the table's file anew, without the bytes of what was erased."""

    table: Annotated[str, Field(max_length=80)]

"""The trainer's SQL of what a line begins with: a version that answers, and weights that can be trained."""

from __future__ import annotations

from typing import Any, Literal

from services.trainer.group_store import GroupStore
from shared.artifacts import Artifact
from shared.database import Connection, Record
from shared.errors import GiveUpError
from shared.upstream import in_words


class LineStore(GroupStore):
    async def register_base(
        self, policy: str, artifact: Artifact, note: str | None, base: Artifact | None = None
    ) -> Literal["base", "student"]:
        """Make an artifact a policy's v0 or, where v0 is an endpoint, the student that learns from it.

        ``base`` is what an adapter is over. Twice is once; another student takes the place of the one before. Raises
        GiveUpError where v0 is another artifact.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            for kept in (base, artifact):
                if kept is not None:
                    await self._keep_artifact(connection, kept)
            over = base.sha256 if base else None
            v0 = await self._keep_v0(connection, policy, note, artifact.sha256, over, None)
            if v0["artifact_sha256"] is None:
                await self._keep_student(connection, policy, artifact.sha256, over, note)
                return "student"
            if v0["artifact_sha256"] != artifact.sha256:
                raise _taken(policy, v0)
            return "base"

    async def register_endpoint(self, policy: str, serving: dict[str, Any], note: str | None) -> None:
        """Make a fixed endpoint a policy's v0. Twice is once; raises GiveUpError where v0 is something else."""
        async with self._pool.acquire() as connection, connection.transaction():
            v0 = await self._keep_v0(connection, policy, note, None, None, serving)
            if v0["artifact_sha256"] is not None or v0["serving"] != serving:
                raise _taken(policy, v0)

    async def _keep_v0(
        self,
        connection: Connection,
        policy: str,
        note: str | None,
        artifact_sha256: str | None,
        adapter_of: str | None,
        serving: dict[str, Any] | None,
    ) -> Record:
        """The v0 that a policy has: this one, or the one that was there before."""
        await connection.execute(
            """insert into models (policy, version, number, method, artifact_sha256, adapter_of, serving, note)
               values ($1, 'v0', 0, 'base', $2, $3, $4, $5) on conflict do nothing""",
            policy,
            artifact_sha256,
            adapter_of,
            serving,
            note,
        )
        found = await connection.fetchrow(
            "select artifact_sha256, serving from models where policy = $1 and number = 0", policy
        )
        assert found is not None
        return found

    async def _keep_student(
        self, connection: Connection, policy: str, artifact_sha256: str, adapter_of: str | None, note: str | None
    ) -> None:
        await connection.execute(
            """insert into students (policy, artifact_sha256, adapter_of, note) values ($1, $2, $3, $4)
               on conflict (policy) do update
                  set (artifact_sha256, adapter_of, note, created_at)
                    = (excluded.artifact_sha256, excluded.adapter_of, excluded.note, now())
                where students.artifact_sha256 <> excluded.artifact_sha256""",
            policy,
            artifact_sha256,
            adapter_of,
            note,
        )

    async def _keep_artifact(self, connection: Connection, artifact: Artifact) -> None:
        await connection.execute(
            """insert into artifacts (sha256, uri, size_bytes, files) values ($1, $2, $3, $4)
               on conflict (sha256) do nothing""",
            artifact.sha256,
            artifact.uri,
            artifact.size_bytes,
            artifact.files,
        )

    async def weights_of(self, batch_id: str) -> str:
        """SHA-256 of the artifact that a batch is trained from: its parent's, or its student's."""
        sha256: str | None = await self._pool.fetchval(
            """select coalesce(b.student_sha256, m.artifact_sha256)
                 from batches b join models m on (m.policy, m.version) = (b.policy, b.parent_version)
                where b.batch_id = $1""",
            batch_id,
        )
        if sha256 is None:
            raise GiveUpError(f"batch {batch_id} has no weights to begin with: its parent is not registered")
        return sha256


def _taken(policy: str, v0: Record) -> GiveUpError:
    answers = in_words(v0["serving"]) if v0["artifact_sha256"] is None else f"artifact {v0['artifact_sha256'][:12]}"
    return GiveUpError(f"policy {policy} already has a base, v0 is {answers}; name another policy to start anew")

"""vLLM: the base by the name that it was started with, and adapters over it that come and go while it runs.

It needs ``--enable-lora`` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. What it serves is known by its list of models,
where an adapter stands with the path that it was read from; its ``system_fingerprint`` is of its configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.deployer.domain import Version
from services.deployer.serving.asking import agreement, replies
from services.deployer.serving.endpoint import Endpoint
from services.deployer.serving.intact import Intact
from services.deployer.serving.serving import NotYet, Outcome, Wrong
from shared.routing import Target
from shared.telemetry import logger
from shared.upstream import Place


class VllmServing:
    """``artifacts``: the artifacts' directory as the server sees it."""

    def __init__(self, place: Place, endpoint: Endpoint, intact: Intact, *, artifacts: str, tolerance: float) -> None:
        self._place = place
        self._endpoint = endpoint
        self._intact = intact
        self._artifacts = artifacts.rstrip("/")
        self._tolerance = tolerance

    def target(self, version: Version) -> Target:
        return self._place.target(self._name(version), version.artifact_sha256)

    def _name(self, version: Version) -> str:
        """What the server calls it: the base as it was started, an adapter as it was loaded."""
        if version.artifact_sha256 is None or (version.adapter_of is None and version.number == 0):
            return self._place.model or ""
        return f"{version.policy}-{version.version}-{version.artifact_sha256[:8]}"

    def _path(self, version: Version) -> str:
        return f"{self._artifacts}/{version.artifact_sha256}"

    async def verify(self, version: Version) -> Outcome:
        """Its artifact is intact, the server lists it, answers as it, and agrees with the trainer about its tokens."""
        if version.artifact_sha256 is None:
            return Wrong("it has neither an artifact nor an endpoint of its own")
        if version.adapter_of is None and version.number > 0:
            return Wrong(
                f"it has whole weights, and vLLM at {self._place.base_url} serves {self._place.model} and adapters "
                "over it: train adapters (lora), or let inference serve the policy"
            )
        directory = await self._intact.open(version.artifact_sha256)
        if isinstance(directory, (Wrong, NotYet)):
            return directory
        name = self._name(version)
        against = await self._held(version) or await replies(self._endpoint, name)
        return against or await agreement(self._endpoint, name, directory, self._tolerance)

    async def _held(self, version: Version) -> Wrong | NotYet | None:
        """None where the server holds the version and nothing else under its name."""
        models = await self._models()
        if isinstance(models, NotYet):
            return models
        name = self._name(version)
        if version.adapter_of is None:
            listed = name in models and models[name].get("parent") is None
            return None if listed else NotYet(f"vLLM serves no model {name}: it has {', '.join(sorted(models))[:200]}")
        if name not in models and (fault := await self._load(version)):
            return NotYet(fault)
        root = models[name].get("root") if name in models else self._path(version)
        if root != self._path(version):
            return Wrong(f"vLLM has another adapter under the name {name}, read from {str(root)[-120:]}")
        return None

    async def _models(self) -> dict[str, dict[str, Any]] | NotYet:
        """What the server lists, by name."""
        said = await self._endpoint.ask("models")
        if isinstance(said, NotYet):
            return said
        listed = said.body.get("data") if said.status == 200 and isinstance(said.body, dict) else None
        if not isinstance(listed, list):
            return NotYet(f"vLLM lists no models: {said.words}")
        return {str(model.get("id")): model for model in listed if isinstance(model, dict)}

    async def keep(self, used: Sequence[Version], known: Sequence[Version]) -> list[str]:
        """Load what is used, also after the server began anew; unload what is not. Other people's adapters stay."""
        adapters = {self._name(version): version for version in known if version.adapter_of is not None}
        wanted = {self._name(version): version for version in used if version.adapter_of is not None}
        if not adapters and not wanted:
            return []
        models = await self._models()
        if isinstance(models, NotYet):
            return [f"{name}: {models.reason}" for name in wanted]
        loaded = [await self._load(wanted[name]) for name in sorted(wanted.keys() - models.keys())]
        idle = sorted((adapters.keys() - wanted.keys()) & models.keys())
        unloaded = [await self._unload(name) for name in idle]
        return [fault for fault in (*loaded, *unloaded) if fault is not None]

    async def _load(self, version: Version) -> str | None:
        """None, or why the server does not hold it. Twice is once: another replica may have loaded it."""
        name, path = self._name(version), self._path(version)
        said = await self._endpoint.ask("load_lora_adapter", {"lora_name": name, "lora_path": path})
        if isinstance(said, NotYet):
            return f"{name} was not loaded: {said.reason}"
        if said.status == 404 and isinstance(said.body, dict) and "detail" in said.body:
            return f"{name} was not loaded: start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        if said.status != 200 and "already been loaded" not in said.words:
            return f"{name} was not loaded from {path}: {said.words}"
        logger().info("adapter_loaded", policy=version.policy, version=version.version, model=name)
        return None

    async def _unload(self, name: str) -> str | None:
        said = await self._endpoint.ask("unload_lora_adapter", {"lora_name": name})
        if isinstance(said, NotYet):
            return f"{name} was not unloaded: {said.reason}"
        if said.status not in (200, 404):
            return f"{name} was not unloaded: {said.words}"
        logger().info("adapter_unloaded", model=name)
        return None

    async def close(self) -> None:
        await self._endpoint.close()

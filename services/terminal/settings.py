from __future__ import annotations

from pathlib import Path

from pydantic import Field

from shared.settings import Settings


class CliSettings(Settings):
    dir: Path = Field(Path(".ratchet"), description="the installation's directory; `ratchet up` and `--dir` set it")
    nats_dir: Path | None = Field(None, description="home of the embedded broker; `ratchet up` sets it")
    gateway_url: str | None = Field(None, description="where agents' model calls go; `ratchet up` sets it")
    admin_url: str | None = Field(None, description="the operators' page; `ratchet up` sets it")
    inference_url: str | None = Field(None, description="where the inference service answers; `ratchet up` sets it")

"""What only the inference service is told."""

from __future__ import annotations

from pydantic import Field

from shared.settings import Settings


class InferenceSettings(Settings):
    max_loaded: int = Field(4, ge=1, description="checkpoints kept in memory; the least recently asked leaves first")
    batch_max: int = Field(64, ge=1, le=1024, description="requests answered by one forward pass at most")
    batch_wait_ms: float = Field(3.0, ge=0, description="a batch starts when no request has come for this long")
    batch_tokens: int = Field(131_072, ge=1, description="padded prompt tokens in one forward pass at most")
    default_max_tokens: int = Field(512, ge=1, description="reply length where the request names none")
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="larger requests are refused")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto takes a GPU where there is one")
    torch_threads: int = Field(1, ge=1, description="threads of one tensor operation on the CPU")

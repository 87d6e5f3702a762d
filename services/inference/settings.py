"""What only the inference service is told."""

from __future__ import annotations

from pydantic import Field, SecretStr

from shared.settings import Settings


class InferenceSettings(Settings):
    max_loaded: int = Field(4, ge=1, description="checkpoints kept in memory; the least recently asked leaves first")
    adapters_max: int = Field(
        16, ge=1, description="LoRA adapters kept over one checkpoint; the least recently asked leaves"
    )
    batch_max: int = Field(64, ge=1, le=1024, description="requests answered at once by one checkpoint")
    batch_wait_ms: float = Field(
        3.0, ge=0, description="an idle checkpoint starts when no request has come for this long"
    )
    batch_tokens: int = Field(
        131_072, ge=1, description="tokens, prompts and room for replies, padded, in one batch at most"
    )
    default_max_tokens: int = Field(512, ge=1, description="reply length where the request names none")
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="larger requests are refused")
    body_timeout_s: float = Field(30.0, gt=0, description="longest time in which a request must arrive whole")
    answer_timeout_s: float = Field(300.0, gt=0, description="longest time from a request to its reply")
    waiting_max: int = Field(1024, ge=1, description="requests that wait at once; more are told to come back")
    inference_token: SecretStr | None = Field(
        None, description="who asks inference must send it; gateway and deployer need it too"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto takes a GPU where there is one")
    torch_threads: int = Field(1, ge=1, description="threads of one tensor operation on the CPU")

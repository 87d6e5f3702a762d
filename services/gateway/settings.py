from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from shared.settings import Settings
from shared.upstream import UpstreamKeys


class GatewaySettings(Settings):
    request_timeout_s: float = Field(60.0, gt=0, description="longest time a model may take to answer, or to go on")
    connect_timeout_s: float = Field(2.0, gt=0, description="longest time to connect to a model's server")
    inference_token: SecretStr | None = Field(None, description="sent to inference, where it asks for one")
    upstream_keys: UpstreamKeys = Field(
        default_factory=dict, description='keys of other models\' servers by name, as JSON: {"openai": "sk-..."}'
    )
    target_connections: int = Field(256, ge=1, description="connections to models' servers at most")
    body_limit_bytes: int = Field(2 * 1024 * 1024, ge=1024, description="largest request body that is read")
    body_timeout_s: float = Field(10.0, gt=0, description="longest time for a request's body to come")
    record_wait_s: float = Field(2.0, ge=0, description="how long a reply waits until its record is acknowledged")
    record_backlog_bytes: int = Field(
        64 * 1024 * 1024, ge=1024, description="records held in memory while the broker takes its time"
    )
    gateway_spool_dir: Path = Field(
        Path(".ratchet/gateway-spool"),
        description="where records are kept while the broker is away; on a disk that stays",
    )
    gateway_spool_bytes: int = Field(
        1024**3, ge=1024, description="most that is kept there; beyond it records are lost"
    )
    health_s: float = Field(2.0, gt=0, description="how often each version's health is reported")

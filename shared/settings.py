"""Settings that every service has. Each service adds only its own fields.

Read from the environment (prefix ``RATCHET_``), then from the file ``env`` that ``ratchet up`` writes into its
directory: ``RATCHET_DIR``, or ``.ratchet``. Made once in ``app.py`` and passed on, never at import.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from shared.errors import ConfigurationError

S = TypeVar("S", bound="Settings")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="RATCHET_", extra="ignore", hide_input_in_errors=True)

    nats_url: str = Field("nats://127.0.0.1:4222", description="NATS server, with JetStream")
    database_url: SecretStr = Field(
        SecretStr("postgresql://ratchet@127.0.0.1:5432/ratchet"), description="Postgres 15 or newer"
    )
    artifacts_dir: Path = Field(
        Path(".ratchet/artifacts"),
        description="where artifacts are kept, or where those of RATCHET_ARTIFACTS are cached",
    )
    artifacts: str | None = Field(
        None,
        description="a bucket: s3://bucket/prefix, gs://, az://, vercel-blob://private/prefix; or a folder",
    )
    artifacts_options: dict[str, str] = Field(
        {}, description='of the bucket, by obstore, as JSON: {"region": "..."}; credentials stand in AWS_* and the like'
    )
    http_host: str = Field("127.0.0.1", description="where /health, /ready, /metrics and APIs listen")
    http_port: int = Field(0, ge=0, le=65535, description="0 lets the system choose")
    metrics_token: SecretStr | None = Field(
        None,
        description="bearer token that /metrics and the reasons in /ready ask for; none: whoever reaches the port",
        min_length=8,
    )
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="of structured logs")
    window_s: int = Field(3600, ge=1, le=7 * 86_400, description="length of a window in seconds")
    sweep_s: float = Field(2.0, gt=0, description="how often unannounced rows are looked for")
    database_pool: int = Field(5, ge=1, le=100, description="connections a process holds at most")


def installation_dir() -> Path:
    """Where `ratchet up` keeps what this shell speaks of: ``RATCHET_DIR``, or ``.ratchet``."""
    return Path(os.environ.get("RATCHET_DIR") or ".ratchet")


def load(kind: type[S]) -> S:
    """Settings from the environment and ``env``. Raises ConfigurationError naming the variable or file at fault."""
    file = installation_dir() / "env"
    chosen: dict[str, Any] = {"_env_file": file}
    try:
        return kind(**chosen)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}; mend or remove it") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = "RATCHET_" + "_".join(str(part) for part in first["loc"]).upper()
        raise ConfigurationError(f"{name}: {first['msg']}. Set it, or unset it for the default.") from error
    except SettingsError as error:  # what should be JSON is not
        raise ConfigurationError(f"{error}; it must be JSON. Set it, or unset it for the default.") from error

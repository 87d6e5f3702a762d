"""Model servers that are not ours alone: where one is, and the keys to them by the names that stand in their place.

A name may stand in Postgres, in routes and in logs; the key itself in the settings of who calls, and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode
from ratchet_sdk.sampling import NEUTRAL

from shared.errors import ConfigurationError
from shared.routing import ADDS, Adds, Credential, Kind, Neutral, Target

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY = re.compile(r"[!-~]{1,4096}")


def _read(value: Any) -> Any:
    """The keys as they stand in the environment. What is wrong is said without what stands there."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except ValueError:
            raise ValueError('expected a JSON object of names and keys, as {"openai": "sk-..."}') from None
    if not isinstance(value, Mapping):
        raise ValueError('expected a JSON object of names and keys, as {"openai": "sk-..."}')
    for name, key in value.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError("a key's name must be letters, digits, _, . and -, 64 at most")
        if not isinstance(key, SecretStr) and not (isinstance(key, str) and _KEY.fullmatch(key)):
            raise ValueError(f"the key named {name} must be text without spaces")
    return value


UpstreamKeys = Annotated[dict[str, SecretStr], NoDecode, BeforeValidator(_read)]


def bearer(keys: Mapping[str, SecretStr], name: str | None) -> dict[str, str]:
    """The header that shows the key of that name; none for None. Raises ConfigurationError for a name without a key."""
    if name is None:
        return {}
    if name not in keys:
        raise ConfigurationError(f"no key is named {name} here; add it to RATCHET_UPSTREAM_KEYS and start anew")
    return {"authorization": f"Bearer {keys[name].get_secret_value()}"}


def in_words(serving: Mapping[str, Any]) -> str:
    """A version without an artifact, as people are told of it: where it answers, and as what."""
    return f"endpoint {serving.get('base_url')} model {serving.get('model')}"


class Place(BaseModel):
    """Where versions answer, as a setting or a row of ``models`` says it.

    ``model``: what the server calls the model that it was started with. ``artifacts``: the artifacts' directory as a
    vLLM server sees it. ``neutral`` and ``adds`` as in ``Target``; None leaves them to the kind.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    base_url: Annotated[str, Field(pattern=r"^https?://\S+$", max_length=500)]
    model: Annotated[str, Field(min_length=1, max_length=300)] | None = None
    credential: Credential | None = None
    artifacts: str | None = None
    neutral: tuple[Neutral, ...] | None = None
    adds: tuple[Adds, ...] | None = None

    @field_validator("base_url")
    @classmethod
    def _no_key_in_it(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must be an address alone: a key goes into RATCHET_UPSTREAM_KEYS, under a name")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.kind != "inference" and self.model is None:
            raise ValueError(f"a place of kind {self.kind} needs model: what the server calls its model")
        return self

    def target(self, model: str, artifact_sha256: str | None) -> Target:
        """What a route says of a version that answers here as ``model``.

        Of a server that is not ours, or vLLM, it is only known that it takes what OpenAI itself takes.
        """
        foreign = self.kind == "openai"
        neutral = self.neutral if self.neutral is not None else () if foreign else tuple(NEUTRAL)
        adds = self.adds if self.adds is not None else ("stream_options",) if foreign else ADDS
        return Target(
            kind=self.kind,
            base_url=self.base_url,
            model=model,
            artifact_sha256=artifact_sha256,
            credential=self.credential,
            neutral=list(neutral),
            adds=list(adds),
        )

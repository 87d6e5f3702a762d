"""What an agent holds: the seed of its nkey for the broker, and a key for the gateway. Neither leaves its machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.local.processes import replace_private
from shared.credentials import SHOWN, GatewayKey, fingerprint, new_key
from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from shared.bus import Bus


def kept_key(path: Path) -> str:
    """The public key of the seed in ``path``; made at first use, readable by its owner alone.

    Raises ConfigurationError where the file holds something else.
    """
    import nkeys

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(seed + b"\n")
    try:
        public: bytes = nkeys.from_seed(bytearray(path.read_bytes().strip())).public_key
    except (nkeys.NkeysError, ValueError) as error:
        raise ConfigurationError(f"{path} holds no nkey seed; name another file") from error
    return public.decode()


async def issue_gateway_key(bus: Bus, agent_id: str, **limits: Any) -> str:
    """A new key for the gateway, known to nobody but the caller: admin is told its hash, and tells the gateways.

    ``limits`` are fields of GatewayKey. Raises RetryLaterError where admin is away, or could not tell them yet.
    """
    key = new_key()
    known = GatewayKey(agent_id=agent_id, shown=key[:SHOWN], **limits)
    request = {"key_sha256": fingerprint(key), "key": known.model_dump(mode="json")}
    await bus.command("admin", "add_key", request)
    return key


def keep_gateway_key(path: Path, key: str) -> None:
    """Write a key where its owner alone reads it, in the place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_private(path, key + "\n")

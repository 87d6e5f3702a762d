"""An agent's nkey: the seed, which signs and never leaves its machine, and the public key, which the broker knows."""

from __future__ import annotations

import os
from pathlib import Path

from shared.errors import ConfigurationError


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

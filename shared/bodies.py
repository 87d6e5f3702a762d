"""How the JSON object of an event is kept in ``bodies``: compressed, each on its own, as its first bytes say.

zstd at its quickest useful level takes under half of zlib's time for an event of 1 KiB and as much room; rows that were
written before it came are zlib, and stay so.
"""

from __future__ import annotations

import threading
import zlib

import zstandard
from pydantic_core import from_json, to_json

LEVEL = 1
# What every number that no float holds is written with: a literal, an exponent of three digits, or many digits. Looked
# for as plain text once all digits are alike: a pattern took a third of the time that reading a run takes.
SHAPE = bytes.maketrans(b"123456789E", b"000000000e")
BEYOND = (b"NaN", b"Infinity", b"e000", b"e+000", b"0" * 200)
MAGIC = zstandard.FRAME_HEADER
_of_thread = threading.local()  # a compressor's memory is made once and used again, by one thread at a time


def packed(content: bytes) -> bytes:
    """What stands in ``bodies.body`` for an event as it was sent."""
    try:
        compress = _of_thread.compress
    except AttributeError:
        compress = _of_thread.compress = zstandard.ZstdCompressor(level=LEVEL).compress
    kept: bytes = compress(content)
    return kept


def unpacked(body: bytes) -> bytes:
    """The event as it was sent."""
    if body.startswith(MAGIC):
        return zstandard.decompress(body)
    return zlib.decompress(body)


def finite(content: bytes) -> bytes:
    """An event's JSON with what no float holds as text ("NaN", "Infinity"); the same object where there is none.

    RFC 8259 (6) has no such numbers. Pydantic reads them in free fields all the same, ``1e999`` too, and whoever writes
    one on stumbles. The recorder takes none; what it took before is read through this. No JSON stays what it is.
    """
    shape = content.translate(SHAPE)
    if not any(text in shape for text in BEYOND):
        return content
    try:
        value = from_json(content)
    except ValueError:
        return content
    mended = to_json(value, inf_nan_mode="strings")
    return content if mended == to_json(value) else mended

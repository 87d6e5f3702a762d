"""Events on disk while the broker is away: appended, checksummed, bounded, read back in order.

A directory of segments, for one process at a time: a second process of the same agent takes the one beside it, and a
later one whichever is free and holds something. A record is a mark, then two big-endian 32-bit numbers, the length
and the CRC-32 of what follows; then one byte of flags, the message id, a zero byte, and the event as it would be sent.
``position`` says up to where everything is acknowledged; it may lie behind, since an event that is sent twice is stored
once. What is not whole is left out up to the next whole record: a crash cuts off the end, which was promised to nobody,
and a disk that forgets a byte costs the event that it was in.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MARK = b"\xffRX\x01"  # its first byte occurs in no UTF-8: an event's own text cannot look like a record
HEAD = struct.Struct(">4sII")
PLACES = 8  # for processes of one agent at the same time
SEGMENT_BYTES = 8 * 1024 * 1024
SUFFIX = ".events"
TRIED, PACKED = 1, 2  # flags: it was sent before and may be stored; it is gzipped


@dataclass(frozen=True)
class Spooled:
    """An event that waits on disk, in a record of ``size_bytes``. ``place``: (segment, offset) where that ends."""

    message_id: str
    data: bytes
    flags: int
    place: tuple[int, int]
    size_bytes: int


class SpoolBusyError(Exception):
    """Other processes write to this spool and to all beside it."""


class Spool:
    """Not for several threads at once. Every method may raise OSError. ``directory`` is known once it is open."""

    def __init__(self, directory: Path, *, max_bytes: int = 256 * 1024 * 1024) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.pending = 0  # events that are not acknowledged
        self.damaged = 0  # bytes that were left out because their checksum does not fit
        self._lock: BinaryIO | None = None
        self._bytes: dict[int, int] = {}  # of each segment
        self._begin = (0, 0)
        self._tail: BinaryIO | None = None

    def open(self) -> None:
        """Take the directory and look what it holds. Raises SpoolBusyError."""
        self.directory, self._lock = self._taken()
        found = sorted(int(path.stem) for path in self.directory.glob(f"*{SUFFIX}") if path.stem.isdecimal())
        self._begin = self._read_position(found)
        for segment in found:
            if segment < self._begin[0]:
                self._path(segment).unlink()
            else:
                self._bytes[segment] = self._path(segment).stat().st_size
        for segment in list(self._bytes):
            end = self._begin[1] if segment == self._begin[0] else 0
            for record in self._records(segment, end):
                self.pending += 1
                self.damaged += record.place[1] - record.size_bytes - end
                end = record.place[1]
            if end < self._bytes[segment]:
                self.damaged += self._bytes[segment] - end
                os.truncate(self._path(segment), end)
                self._bytes[segment] = end

    def _taken(self) -> tuple[Path, BinaryIO]:
        """The first place that is free, before others one with events in it, and the lock on it."""
        first = self.directory
        places = [first, *(first.with_name(f"{first.name}.{n}") for n in range(1, PLACES))]
        for place in sorted(places, key=lambda place: not any(place.glob(f"*{SUFFIX}"))):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (place / "lock").open("wb")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
            else:
                return place, lock
        raise SpoolBusyError(f"{first} and the {PLACES - 1} beside it are in use by other processes")

    def close(self) -> None:
        for file in (self._tail, self._lock):
            if file is not None:
                file.close()
        self._tail = self._lock = None

    def append(self, events: Sequence[tuple[str, bytes, int]]) -> int:
        """Keep (message id, data, flags) in order, on disk when this returns. Gives how many there was room for.

        Where the disk refuses, nothing of it is kept.
        """
        room = self.max_bytes - sum(self._bytes.values())
        before = dict(self._bytes)
        kept = 0
        try:
            for message_id, data, flags in events:
                payload = bytes([flags]) + message_id.encode() + b"\0" + data
                room -= HEAD.size + len(payload)
                if room < 0:
                    break
                self._write(HEAD.pack(MARK, len(payload), zlib.crc32(payload)) + payload)
                kept += 1
            if self._tail is not None:
                self._tail.flush()
                os.fsync(self._tail.fileno())
        except OSError:
            self._undo(before)
            raise
        self.pending += kept
        return kept

    def _undo(self, before: dict[int, int]) -> None:
        if self._tail is not None:
            with contextlib.suppress(OSError):  # what it still holds cannot be written either
                self._tail.close()
            self._tail = None
        for segment in self._bytes.keys() - before.keys():
            self._path(segment).unlink(missing_ok=True)
        for segment, size_bytes in before.items():
            os.truncate(self._path(segment), size_bytes)
        self._bytes = before

    def read(self, events: int, size_bytes: int) -> list[Spooled]:
        """The oldest that are not done with, up to so many events or bytes, one at the least where there is one."""
        found: list[Spooled] = []
        read_bytes = 0
        for segment in sorted(self._bytes):
            if segment < self._begin[0]:
                continue
            for record in self._records(segment, self._begin[1] if segment == self._begin[0] else 0):
                read_bytes += len(record.data)
                if len(found) == events or (found and read_bytes > size_bytes):
                    return found
                found.append(record)
        return found

    def done(self, last: Spooled, events: int) -> None:
        """The ``events`` oldest, up to ``last``, are done with for good. A full disk is no error here."""
        self._begin = last.place
        self.pending -= events
        if not self.pending and self._tail is not None:
            self._tail.close()
            self._tail = None
        for segment in sorted(self._bytes):
            if segment < last.place[0] or not self.pending:
                self._path(segment).unlink(missing_ok=True)
                del self._bytes[segment]
        temporary = self.directory / "position.new"
        with contextlib.suppress(OSError):  # it lies behind then, and what is sent twice is stored once
            temporary.write_text(f"{self._begin[0]} {self._begin[1]}\n")
            temporary.replace(self.directory / "position")

    def forget(self) -> None:
        """The files are gone: nothing is pending, and the next event begins a new one."""
        if self._tail is not None:
            self._tail.close()
            self._tail = None
        self._bytes = {}
        self.pending = 0

    def _write(self, record: bytes) -> None:
        last = max(self._bytes, default=self._begin[0])
        if self._tail is None or self._bytes[last] + len(record) > SEGMENT_BYTES:
            if self._tail is not None:
                os.fsync(self._tail.fileno())
                self._tail.close()
            last += 1  # never into an old segment, whose end may be torn
            self._tail = self._path(last).open("xb", buffering=1024 * 1024)
            self._bytes[last] = 0
        self._tail.write(record)
        self._bytes[last] += len(record)

    def _records(self, segment: int, offset: int) -> Iterator[Spooled]:
        """Those that are whole, from ``offset`` to the end; none where somebody took the file away."""
        if self._tail is not None:
            self._tail.flush()
        with contextlib.suppress(FileNotFoundError), self._path(segment).open("rb") as file:
            while True:
                file.seek(offset)
                if (payload := _payload(file)) is None:
                    if (offset := _next_mark(file, offset + 1)) < 0:
                        return
                    continue
                size_bytes = HEAD.size + len(payload)
                offset += size_bytes
                message_id, _, data = payload[1:].partition(b"\0")
                yield Spooled(message_id.decode(), data, payload[0], (segment, offset), size_bytes)

    def _read_position(self, found: list[int]) -> tuple[int, int]:
        try:
            segment, offset = (self.directory / "position").read_text().split()
            return int(segment), int(offset)
        except (OSError, ValueError):  # never written, or cut off by a crash: everything that is there is sent again
            return (found[0] if found else 0, 0)

    def _path(self, segment: int) -> Path:
        return self.directory / f"{segment:012}{SUFFIX}"


def _payload(file: BinaryIO) -> bytes | None:
    """What the record that begins here holds; None where none does."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    mark, length, checksum = HEAD.unpack(head)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if mark != MARK or not 0 < length <= left:
        return None
    payload = file.read(length)
    return payload if zlib.crc32(payload) == checksum else None


def _next_mark(file: BinaryIO, offset: int) -> int:
    """Where the next record may begin; -1 where no mark is left."""
    file.seek(offset)
    found = file.read().find(MARK)
    return found if found < 0 else offset + found

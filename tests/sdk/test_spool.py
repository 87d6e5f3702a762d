"""The spool: in order, bounded, whole or not at all, and the next process finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratchet_sdk import spool as module
from ratchet_sdk.spool import PACKED, TRIED, Spool, SpoolBusyError


def opened(directory: Path, **options: int) -> Spool:
    spool = Spool(directory, **options)
    spool.open()
    return spool


def events(*numbers: int) -> list[tuple[str, bytes, int]]:
    return [(f"a:{n}", b"event %d \0 end" % n, n % 4) for n in numbers]


def told(spool: Spool, most: int = 1000) -> list[tuple[str, bytes, int]]:
    return [(one.message_id, one.data, one.flags) for one in spool.read(most, 10**9)]


def test_what_is_kept_is_read_in_order_by_the_next_process_too(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    assert spool.append(events(1, 2, 3)) == 3
    assert spool.append(events(4)) == 1
    spool.done(spool.read(2, 10**9)[-1], 2)
    assert told(spool) == events(3, 4)
    spool.close()
    again = opened(tmp_path)
    assert (again.pending, again.damaged) == (2, 0)
    assert told(again) == events(3, 4)
    again.append(events(5))
    assert told(again) == events(3, 4, 5)
    again.done(again.read(3, 10**9)[-1], 3)
    assert (again.pending, told(again), list(tmp_path.glob("*.events"))) == (0, [], [])
    again.append(events(TRIED, PACKED))
    assert told(again) == events(TRIED, PACKED)


def test_each_process_has_its_own_and_a_later_one_finds_what_is_left(tmp_path: Path) -> None:
    home = tmp_path / "agent-1"
    spools = [opened(home) for _ in range(module.PLACES)]
    assert len({spool.directory for spool in spools}) == module.PLACES
    with pytest.raises(SpoolBusyError):
        opened(home)
    spools[3].append(events(1, 2))
    for spool in spools:
        spool.close()
    later = opened(home)
    assert (later.directory, told(later)) == (spools[3].directory, events(1, 2))
    assert opened(home).directory == home


def test_it_is_bounded_and_keeps_the_oldest(tmp_path: Path) -> None:
    size = module.HEAD.size + 1 + len("a:1") + 1 + len(events(1)[0][1])
    spool = opened(tmp_path, max_bytes=3 * size)
    assert spool.append(events(1, 2, 3, 4, 5)) == 3
    assert spool.append(events(6)) == 0
    assert told(spool) == events(1, 2, 3)
    spool.done(spool.read(3, 10**9)[-1], 3)
    assert spool.append(events(7)) == 1


@pytest.mark.parametrize("cut", range(1, 30))
def test_what_a_crash_cut_off_is_left_out_and_nothing_else(tmp_path: Path, cut: int) -> None:
    spool = opened(tmp_path)
    spool.append(events(1, 2))
    spool.close()
    [segment] = tmp_path.glob("*.events")
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-cut])
    again = opened(tmp_path)
    kept = 1 if cut <= len(whole) // 2 else 0
    assert told(again) == events(1, 2)[:kept]
    assert (again.pending, again.damaged) == (kept, len(whole) - cut - kept * len(whole) // 2)
    again.append(events(3))
    assert told(again) == [*events(1, 2)[:kept], *events(3)]


@pytest.mark.parametrize("place", range(36))  # each byte of the second of three records
def test_a_flipped_bit_costs_the_event_that_it_is_in_and_no_other(tmp_path: Path, place: int) -> None:
    spool = opened(tmp_path)
    spool.append(events(1, 2, 3))
    spool.close()
    [segment] = tmp_path.glob("*.events")
    data = bytearray(segment.read_bytes())
    assert len(data) % 3 == 0
    size = len(data) // 3
    data[size + place % size] ^= 4
    segment.write_bytes(data)
    again = opened(tmp_path)
    assert told(again) == events(1, 3)
    assert (again.pending, again.damaged) == (2, size)
    again.done(again.read(1, 10**9)[-1], 1)
    assert told(again) == events(3)
    again.done(again.read(1, 10**9)[-1], 1)
    assert (again.pending, list(tmp_path.glob("*.events"))) == (0, [])


def test_a_mark_before_a_hole_of_zeros_is_no_record(tmp_path: Path) -> None:
    """What a disk gives that lost a block: zeros are a length of none, whose checksum fits."""
    spool = opened(tmp_path)
    spool.append(events(1, 2, 3))
    spool.close()
    [segment] = tmp_path.glob("*.events")
    data = segment.read_bytes()
    size = len(data) // 3
    segment.write_bytes(data[: size + len(module.MARK)] + bytes(size - len(module.MARK)) + data[2 * size :])
    again = opened(tmp_path)
    assert told(again) == events(1, 3)
    assert (again.pending, again.damaged) == (2, size)


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened(tmp_path)
    spool.append(events(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            spool.append(events(2, 3))
    assert (spool.pending, told(spool)) == (1, events(1))
    spool.append(events(4))
    assert told(spool) == events(1, 4)
    spool.close()
    assert told(opened(tmp_path)) == events(1, 4)


def test_a_position_that_cannot_be_written_counts_nothing_twice(tmp_path: Path) -> None:
    """A full disk is where a spool is used: an error after the acks would have the same window counted again."""
    spool = opened(tmp_path)
    spool.append(events(1, 2, 3, 4))
    (tmp_path / "position.new").mkdir()  # as unwritable as on a full disk
    spool.done(spool.read(2, 10**9)[-1], 2)
    assert (spool.pending, told(spool)) == (2, events(3, 4))
    spool.close()
    again = opened(tmp_path)
    assert told(again) == events(1, 2, 3, 4)  # the position lies behind: sent again, stored once


@given(st.lists(st.tuples(st.sampled_from(["append", "done", "again"]), st.integers(1, 9)), max_size=30))
def test_any_sequence_keeps_a_queue(tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]]) -> None:
    directory = tmp_path_factory.mktemp("spool")
    spool, expected, number = opened(directory), list[tuple[str, bytes, int]](), 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "SEGMENT_BYTES", 100)
        for move, many in moves:
            if move == "append":
                new = events(*range(number, number + many))
                number += many
                assert spool.append(new) == many
                expected += new
            elif move == "done" and (window := spool.read(many, 10**9)):
                spool.done(window[-1], len(window))
                expected = expected[len(window) :]
            elif move == "again":
                spool.close()
                spool = opened(directory)
            assert told(spool) == expected
            assert spool.pending == len(expected)
    spool.close()

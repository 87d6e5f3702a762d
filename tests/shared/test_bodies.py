"""How an event is kept, now and before."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bodies import finite, packed, unpacked
from shared.trajectories import assemble


@given(st.binary(max_size=3000))
def test_what_was_packed_comes_back_whichever_way_it_was_packed(content: bytes) -> None:
    assert unpacked(packed(content)) == content
    assert unpacked(zlib.compress(content, 1)) == content


def test_threads_pack_side_by_side() -> None:
    contents = [bytes([n]) * 100_000 for n in range(64)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda content: unpacked(packed(content)), contents)) == contents


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 400 + ".5", "-" + "9" * 250 + "E99"])
def test_a_number_that_was_stored_and_is_none_can_be_read_and_written_on(number: str) -> None:
    """The recorder took them once."""
    head = '{"kind":"step","step":0,"trajectory_id":"t","started_at":"2026-11-20T10:00:00Z"'
    event = f'{head},"occurred_at":"2026-11-20T10:00:00Z","environment":{{"price":{number}}}}}'.encode()
    run = assemble("a", "t", [event])
    assert run.steps[0].environment["price"] in ("NaN", "Infinity", "-Infinity")
    json.dumps(run.steps[0].environment, allow_nan=False)
    assert run.faults == []


def test_what_is_finite_or_no_json_is_left_as_it_is() -> None:
    for content in (b'{"a":"NaN"}', b'{"a":1e100}', b'{"a":' + b"9" * 400 + b"}", b'{"a":NaN', b'{"a":1.5}'):
        assert finite(content) is content

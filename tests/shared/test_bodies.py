"""How an event is kept, now and before."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from shared.bodies import packed, unpacked


@given(st.binary(max_size=3000))
def test_what_was_packed_comes_back_whichever_way_it_was_packed(content: bytes) -> None:
    assert unpacked(packed(content)) == content
    assert unpacked(zlib.compress(content, 1)) == content


def test_threads_pack_side_by_side() -> None:
    contents = [bytes([n]) * 100_000 for n in range(64)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda content: unpacked(packed(content)), contents)) == contents

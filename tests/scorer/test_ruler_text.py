"""What a judge is shown fits, is cut fairly, and is told once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scorer.ruler.text import fair_shares, shared_beginning, tokens_at_most


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("The price of ACME rose because the news was good", 16),
        ("1234567890", 10),  # some vocabularies have single digits alone
        ('{"a": [1, 2]}', 11),
        ("价格上涨", 8),
        ("\U0001f600", 3),
        ("\ud800", 2),
    ],
)
def test_tokens_are_counted_upwards(text: str, tokens: int) -> None:
    assert tokens_at_most(text) == tokens


@given(st.text(), st.text())
def test_a_longer_text_never_counts_less(one: str, other: str) -> None:
    assert max(tokens_at_most(one), tokens_at_most(other)) <= tokens_at_most(one + other)
    assert tokens_at_most(one + other) <= tokens_at_most(one) + tokens_at_most(other)
    assert tokens_at_most(one) >= len(one) / 3


@given(st.lists(st.integers(0, 1000), max_size=8), st.integers(-10, 3000))
def test_shares_are_fair(sizes: list[int], room: int) -> None:
    shares = fair_shares(sizes, room)
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert sum(shares) <= max(0, room)
    if sum(sizes) <= room:
        assert shares == sizes
    cut = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    if cut:
        assert max(shares) <= min(cut) + 1, "nobody has more than one that is cut"
        assert sum(shares) >= room - len(sizes)


@given(st.lists(st.lists(st.sampled_from("ab"), max_size=5), min_size=1, max_size=4))
def test_the_shared_beginning_is_the_longest(transcripts: list[list[str]]) -> None:
    shared = shared_beginning(transcripts)
    assert all(lines[: len(shared)] == shared for lines in transcripts)
    after = {lines[len(shared)] if len(lines) > len(shared) else None for lines in transcripts}
    assert None in after or len(after) > 1

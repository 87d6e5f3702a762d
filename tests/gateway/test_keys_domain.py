"""A key's limits against what it has used."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.keys_domain import Limited, Use, tokens_of, until_tomorrow_s
from shared.credentials import GatewayKey

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def key(**limits: int) -> GatewayKey:
    return GatewayKey(agent_id="a", shown="rk-", **limits)  # type: ignore[arg-type]  # limits are numbers


@given(st.lists(st.integers(0, 320).map(lambda eighths: eighths / 8), max_size=60), st.integers(1, 5))
def test_no_minute_has_more_requests_than_the_key_may(pauses: list[float], limit: int) -> None:
    use, clock_s = Use(NOON.date()), 0.0
    entered: list[float] = []
    for pause in pauses:
        clock_s += pause
        match use.enter(key(requests_per_minute=limit), NOON, clock_s):
            case None:
                entered.append(clock_s)
            case Limited() as limited:
                assert limited.limit == "requests_per_minute"
                after = clock_s + limited.retry_after_s
                assert len([at for at in entered if at > after - 60]) < limit, "the wait that it names is enough"
    for begin in entered:
        assert len([at for at in entered if begin <= at < begin + 60]) <= limit
    assert len(use.entered) <= limit


def test_a_limit_that_was_lowered_holds_at_once() -> None:
    use = Use(NOON.date())
    for second in range(5):
        assert use.enter(key(requests_per_minute=5), NOON, float(second)) is None
    assert use.enter(key(requests_per_minute=2), NOON, 10.0) == Limited("requests_per_minute", 2, 53)


def test_tokens_are_those_of_today_here_and_elsewhere() -> None:
    use = Use(NOON.date(), tokens=4, elsewhere=5)
    assert use.enter(key(tokens_per_day=10), NOON, 0) is None
    use.tokens += 1
    assert use.enter(key(tokens_per_day=10), NOON, 0) == Limited("tokens_per_day", 10, 43_200)
    assert use.enter(key(tokens_per_day=10), NOON + timedelta(days=1), 0) is None
    assert (use.tokens, use.elsewhere, use.requests) == (0, 0, 1)


def test_requests_at_a_time_are_those_that_run() -> None:
    use = Use(NOON.date())
    assert use.enter(key(concurrent=1), NOON, 0) is None
    assert use.enter(key(concurrent=1), NOON, 0) == Limited("concurrent", 1, 1)
    use.running -= 1
    assert use.enter(key(concurrent=1), NOON, 0) is None


def test_a_day_ends_at_midnight_utc() -> None:
    assert until_tomorrow_s(NOON) == 43_200
    assert until_tomorrow_s(NOON.replace(hour=23, minute=59, second=59, microsecond=999_999)) == 1


@pytest.mark.parametrize(
    ("reply", "tokens"),
    [
        ({"usage": {"total_tokens": 9}}, 9),
        ({"usage": {"total_tokens": -9}, "prompt_token_ids": [1, 2]}, 2 + 6),
        ({"usage": [9], "prompt_token_ids": "odd"}, 6 + 6),
        ({"usage": {"total_tokens": True}}, 6 + 6),
    ],
)
def test_what_no_server_counts_is_measured(reply: dict[str, Any], tokens: int) -> None:
    sent = {"messages": [{"content": "0123456789"}]}  # 27 characters of JSON
    choice: dict[str, Any] = {"message": {"content": "abcd\ud800"}}  # 25
    assert tokens_of({**reply, "choices": [choice]}, sent) == tokens
    if tokens != 9:
        choice["token_ids"] = [7]
        assert tokens_of({**reply, "choices": [choice]}, sent) == tokens - 5

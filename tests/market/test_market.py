"""The market: what it promises about facts, returns and profit."""

from __future__ import annotations

import inspect
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.market import market
from examples.market.market import FEE, Facts, drift, facts, oracle, profit
from examples.market.words import DECISIONS, NEWS, QUESTION, SYMBOLS, TICKERS, TRENDS, decision_in, prompt, vocabulary

MANY = [facts(7, window, symbol) for window in range(400) for symbol in SYMBOLS]
TRADED = [each for each in MANY if each.symbol != QUESTION]


@given(st.integers(0, 2**31), st.integers(0, 30), st.sampled_from(SYMBOLS))
def test_the_same_seed_is_the_same_market_whatever_was_asked_before(seed: int, window: int, symbol: str) -> None:
    first = facts(seed, window, symbol)
    market._ticker.cache_clear()
    market._question.cache_clear()
    assert facts(seed, window, symbol) == first


def test_another_seed_is_another_market() -> None:
    assert [facts(1, 5, symbol) for symbol in SYMBOLS] != [facts(2, 5, symbol) for symbol in SYMBOLS]


def test_agents_have_no_part_in_returns() -> None:
    """Nothing that decides a return takes an order, an agent or a decision."""
    assert set(inspect.signature(facts).parameters) == {"seed", "window", "symbol"}
    assert list(inspect.signature(drift).parameters) == ["trend", "news"]


def test_prices_go_on_where_they_ended_and_trends_are_the_last_move() -> None:
    for symbol in TICKERS:
        for window in range(1, 40):
            before, now = facts(3, window - 1, symbol), facts(3, window, symbol)
            assert now.price == before.closes_at
            assert now.trend == (
                "flat" if abs(before.realised) < market.FLAT_BELOW else "rising" if before.realised > 0 else "falling"
            )


def test_the_effect_is_real_and_noisy() -> None:
    noise = [each.realised - each.expected for each in TRADED]
    assert statistics.fmean(noise) == pytest.approx(0, abs=0.04)
    assert statistics.stdev(noise) == pytest.approx(market.NOISE, abs=0.04)
    good = statistics.fmean(each.realised for each in TRADED if NEWS[each.news] > 0.5)
    bad = statistics.fmean(each.realised for each in TRADED if NEWS[each.news] < -0.5)
    assert good > 0.4
    assert bad < -0.4
    traded = [each for each in TRADED if oracle(each.expected) != "hold"]
    wrong = sum((each.realised > 0) != (each.expected > 0) for each in traded) / len(traded)
    assert 0.15 < wrong < 0.35


def test_the_question_resolves_as_it_is_priced() -> None:
    questions = [each for each in MANY if each.symbol == QUESTION]
    assert {each.realised for each in questions} == {1.0, -1.0}
    assert all((each.closes_at == 1.0) == (each.realised > 0) for each in questions)
    error = statistics.fmean(each.realised - each.expected for each in questions)
    assert error == pytest.approx(0, abs=0.12)


def test_an_oracle_earns_more_than_any_fixed_rule() -> None:
    def mean(rule: object) -> float:
        return statistics.fmean(profit(rule(each), each.realised) for each in MANY)  # type: ignore[operator]

    best = mean(lambda each: oracle(each.expected))
    news_alone = mean(lambda each: "buy" if NEWS[each.news] > 0 else "sell" if NEWS[each.news] < 0 else "hold")
    always = mean(lambda each: "buy")
    assert best > news_alone > always
    assert best > 0.4


@pytest.mark.parametrize(
    ("decision", "realised", "earns"),
    [("buy", 0.5, 0.5 - FEE), ("sell", 0.5, -0.5 - FEE), ("hold", 0.5, 0.0), (None, 0.5, -FEE)],
)
def test_profit(decision: str, realised: float, earns: float) -> None:
    assert profit(decision, realised) == pytest.approx(earns)  # type: ignore[arg-type]


def test_windows_are_counted_from_zero() -> None:
    with pytest.raises(ValueError, match="counted from 0"):
        facts(1, -1, "iron")


def test_every_prompt_is_of_known_words_and_hides_the_truth() -> None:
    known = set(vocabulary())
    lengths = set()
    for each in MANY:
        messages = prompt(each.symbol, each.trend, each.news, each.volume)
        words = " ".join(message["content"] for message in messages).split()
        assert set(words) <= known
        lengths.add(len(words))
    assert len(lengths) == 1
    hidden = {"expected", "realised", "closes_at"}
    assert not hidden & set(inspect.signature(prompt).parameters)
    assert hidden < set(Facts.__dataclass_fields__)
    assert 35 <= len(known) <= 60


def test_a_reply_is_a_decision_or_none() -> None:
    assert [decision_in(f" {word.upper()} ") for word in DECISIONS] == list(DECISIONS)
    for reply in ("", "buy sell", "gold", "buy.", "<end>"):
        assert decision_in(reply) is None
    assert set(TRENDS.values()) == {-1, 0, 1}

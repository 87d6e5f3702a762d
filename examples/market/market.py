"""What happens in the market: pure functions of (seed, window, symbol), and nothing else.

A ticker's return in a window is ``trend + news + noise``: 0.4 times the sign of its last move, plus the effect
of the news word, plus normal noise of 0.7. The signal is real and mostly drowned: an oracle that knows the
expected return of each situation is still wrong in about a quarter of its trades. A question resolves "yes" where
the same sum is positive; a share of "yes" costs 0.5 and two are traded, so that it returns +1 or -1.

**What this market does not show.** Prices do not react to the agents: what one buys changes nothing for the
others, now or later. A version that wins here by its orders alone would win at any share. In a market where
orders move prices, a version can gain at a tenth of the traffic and make everybody poorer at all of it; no
canary that compares concurrent agents sees that, and this demo cannot.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from examples.market.words import NEWS, QUESTION, TRENDS, VOLUMES, Decision

TREND_EFFECT = 0.4
NOISE = 0.7
FLAT_BELOW = 0.4  # a last move smaller than this is no trend
FEE = 0.05  # of each trade, so that holding is right where nothing is expected
FIRST_PRICE = 100.0
PRICE_STEP = 0.01  # a return of 1 moves a price by about one percent


@dataclass(frozen=True)
class Facts:
    """One symbol at the start of one window. The words are what every agent sees; the rest is for the world."""

    symbol: str
    trend: str
    news: str
    volume: str
    expected: float  # of ``realised``, before noise
    realised: float  # the return of a bought share by the window's end
    price: float  # at the window's start; of a question, the price of "yes"
    closes_at: float  # the price at the window's end; of a question, 1 for "yes" and 0 for "no"


def facts(seed: int, window: int, symbol: str) -> Facts:
    """The situation of ``symbol`` in window 0, 1, 2 ... of a market. Agents have no part in it."""
    if window < 0:
        raise ValueError(f"windows are counted from 0, got {window}")
    return _question(seed, window) if symbol == QUESTION else _ticker(seed, window, symbol)


@lru_cache(maxsize=65_536)
def _ticker(seed: int, window: int, symbol: str) -> Facts:
    if window == 0:
        last_move, price = 0.0, FIRST_PRICE
    else:
        before = _ticker(seed, window - 1, symbol)
        last_move, price = before.realised, before.closes_at
    source = _source(seed, window, symbol)
    trend = "flat" if abs(last_move) < FLAT_BELOW else "rising" if last_move > 0 else "falling"
    news, volume = source.choice(list(NEWS)), source.choice(VOLUMES)
    expected = drift(trend, news)
    realised = expected + source.gauss(0, NOISE)
    return Facts(symbol, trend, news, volume, expected, realised, price, price * math.exp(PRICE_STEP * realised))


@lru_cache(maxsize=8_192)
def _question(seed: int, window: int) -> Facts:
    source = _source(seed, window, QUESTION)
    trend, news, volume = source.choice(list(TRENDS)), source.choice(list(NEWS)), source.choice(VOLUMES)
    signal = drift(trend, news)
    yes = signal + source.gauss(0, NOISE) > 0
    expected = math.erf(signal / NOISE / math.sqrt(2))  # P(yes) - P(no)
    return Facts(QUESTION, trend, news, volume, expected, 1.0 if yes else -1.0, 0.5, 1.0 if yes else 0.0)


def _source(seed: int, window: int, symbol: str) -> random.Random:
    return random.Random(f"{seed}/{window}/{symbol}")


def drift(trend: str, news: str) -> float:
    """The part of a return that the words tell."""
    return TREND_EFFECT * TRENDS[trend] + NEWS[news]


def profit(decision: Decision | None, realised: float) -> float:
    """What a run earns: the return bought or sold, less the fee. No readable decision trades nothing and costs it."""
    match decision:
        case "buy":
            return realised - FEE
        case "sell":
            return -realised - FEE
        case "hold":
            return 0.0
        case None:
            return -FEE


def oracle(expected: float) -> Decision:
    """The best decision of one who knows the expected return and not the noise: the measure of what can be earned."""
    if abs(expected) <= FEE:
        return "hold"
    return "buy" if expected > 0 else "sell"

"""The language of the market: every word that a trader reads or says, and how a situation is put into words.

A model of a hundred thousand weights has no English to bring along, so the language is closed: these words,
one token each. A decision is one word.
"""

from __future__ import annotations

from typing import Literal, TypedDict

Decision = Literal["buy", "sell", "hold"]

DECISIONS: tuple[Decision, ...] = ("buy", "sell", "hold")
TICKERS = (
    *("iron", "wool", "salt", "rice", "silk", "oil", "gold", "tea"),
    *("corn", "coal", "wine", "cloth", "copper", "sugar", "timber", "amber"),
)
QUESTION = "rain"
SYMBOLS = (*TICKERS, QUESTION)
TRENDS = {"falling": -1, "flat": 0, "rising": 1}
NEWS = {
    "fraud": -0.8,
    "loss": -0.6,
    "delay": -0.4,
    "doubt": -0.2,
    "quiet": 0.0,
    "hope": 0.2,
    "growth": 0.4,
    "profit": 0.6,
    "deal": 0.8,
}
VOLUMES = ("thin", "usual", "heavy")

SYSTEM = "you trade : answer buy , sell or hold ."
ABOUT_TICKER = "ticker {symbol} , trend {trend} , news {news} , volume {volume} ?"
ABOUT_QUESTION = "question {symbol} , odds {trend} , news {news} , volume {volume} ?"

# The same in plain English, for a model that has read some.
SYSTEM_IN_WORDS = "You are a trader. Answer with one word: buy, sell or hold."
TICKER_IN_WORDS = "The price of {symbol} is {trend}, the news is {news} and trading is {volume}."
QUESTION_IN_WORDS = "Will there be {symbol}? The odds are {trend}, the news is {news} and trading is {volume}."


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


def vocabulary() -> list[str]:
    """Every word once, in a fixed order."""
    templates = f"{SYSTEM} {ABOUT_TICKER} {ABOUT_QUESTION}".split()
    words = [word for word in templates if not word.startswith("{")]
    return list(dict.fromkeys([*words, *DECISIONS, *SYMBOLS, *TRENDS, *NEWS, *VOLUMES]))


def prompt(symbol: str, trend: str, news: str, volume: str, *, in_words: bool = False) -> list[Message]:
    """What a trader is asked, as chat messages. The question is asked in the same form as a ticker."""
    ticker, question = (TICKER_IN_WORDS, QUESTION_IN_WORDS) if in_words else (ABOUT_TICKER, ABOUT_QUESTION)
    text = (question if symbol == QUESTION else ticker).format(symbol=symbol, trend=trend, news=news, volume=volume)
    return [{"role": "system", "content": SYSTEM_IN_WORDS if in_words else SYSTEM}, {"role": "user", "content": text}]


def decision_in(reply: str) -> Decision | None:
    """The decision that a reply is, or None where it is not exactly one of the three words."""
    word = reply.strip().lower()
    return next((decision for decision in DECISIONS if decision == word), None)

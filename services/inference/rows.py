"""One request while it is being answered: what it has drawn, when that ends, and what of it has been told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.inference.domain import Answer, Ask, FinishReason, Piece, Refused, Reply, cut_at_stop

REPLACEMENT = "\ufffd"  # what a decoder shows of a character whose last bytes are in tokens to come
CONTEXT = 6  # tokens that text is decoded after: some tokenizers drop the blank before the first


@dataclass(frozen=True, eq=False)
class Version:
    """What is a version's own over a base that it shares: its adapter ("" for none), tokenizer and end tokens."""

    adapter: str
    tokenizer: Any
    ends: frozenset[int]

    @property
    def calls_tools(self) -> bool:
        return "<tool_call>" in str(self.tokenizer.chat_template)

    def text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


@dataclass(eq=False)
class Row:
    """A request in a running batch. ``key`` is its name for whoever asked."""

    key: int
    version: Version
    ask: Ask
    prompt: list[int]
    room: int
    random: random.Random
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: FinishReason | None = None
    refused: Refused | None = None
    told: int = 0
    told_text: tuple[int, int] = (0, 0)  # tokens from which, and up to which, text has been decoded and told

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.token_ids)

    @property
    def at_most(self) -> int:
        """The tokens that prompt and reply may come to."""
        return len(self.prompt) + self.room

    def append(self, token: int, logprob: float) -> None:
        if not -1e30 < logprob <= 1e-3:  # not a number: the weights are broken
            self.refuse("the model's probabilities are not numbers; its weights are broken", "model_broken")
            return
        self.token_ids.append(token)
        self.logprobs.append(min(logprob, 0.0))
        if token in self.version.ends or token in self.ask.sampling.stop_token_ids or self._says_stop():
            self.finished = "stop"
        elif len(self.token_ids) >= self.room or not self.ask.wanted():
            self.finished = "length"

    def refuse(self, message: str, code: Any) -> None:
        self.refused, self.finished = Refused(message, code), "stop"

    def news(self) -> Piece | Answer | None:
        """The answer once it is whole; before, where pieces of it are wanted, what came since the last."""
        if self.refused is not None:
            return self.refused
        if self.finished is not None:
            return self._reply(self.finished)
        if not self.ask.streams or self.told == len(self.token_ids):
            return None
        start, self.told = self.told, len(self.token_ids)
        return Piece(
            prompt_token_ids=self.prompt,
            token_ids=self.token_ids[start:],
            logprobs=self.logprobs[start:],
            token_texts=self._texts(start),
            text=self._new_text(),
            calls_tools=self.version.calls_tools,
        )

    def _new_text(self) -> str:
        """Text of the tokens since the last whole character: decoded after a few before it, and taken off those."""
        start, end = self.told_text
        before = self.version.text(self.token_ids[start:end])
        text = self.version.text(self.token_ids[start:])
        if text.endswith(REPLACEMENT) or not text.startswith(before):
            return ""
        end = len(self.token_ids)
        self.told_text = (max(start, end - CONTEXT), end)
        return text[len(before) :]

    def _says_stop(self) -> bool:
        """Whether a stop string is in the reply; the tail that can hold a new one is looked at first."""
        stops = self.ask.sampling.stop
        if not stops:
            return False
        tail = 8 + max(len(stop.encode()) for stop in stops)
        return all(cut_at_stop(self.version.text(ids), stops)[1] for ids in (self.token_ids[-tail:], self.token_ids))

    def _texts(self, start: int) -> list[str]:
        return [self.version.tokenizer.decode([token]) for token in self.token_ids[start:]]

    def _reply(self, finished: FinishReason) -> Reply:
        return Reply(
            prompt_token_ids=self.prompt,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            token_texts=self._texts(0),
            text=cut_at_stop(self.version.text(self.token_ids), self.ask.sampling.stop)[0],
            finish_reason=finished,
            calls_tools=self.version.calls_tools,
        )

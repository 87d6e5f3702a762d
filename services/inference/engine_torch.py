"""A Hugging Face causal LM in memory with the LoRA adapters over it: chats in, tokens out, one for each row a turn."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.inference.adapters import Adapters
from services.inference.domain import Answer, Ask, Piece, Refused, Scored, joiners, reply_room
from services.inference.rows import Row, Version
from services.inference.running import Running
from services.inference.scoring import scored
from shared.chat import for_template
from shared.errors import GiveUpError
from shared.telemetry import logger

if TYPE_CHECKING:
    import torch


_loading = threading.Lock()  # from_pretrained patches torch's globals: two at a time lose weights


class TorchModel:
    """One checkpoint in memory and what is being asked of it. All methods block, and are called from one thread."""

    def __init__(self, directory: Path, *, device: str, batch_max: int, batch_tokens: int, max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.batch_max, self.batch_tokens, self.max_tokens = batch_max, batch_tokens, max_tokens
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        try:
            with _loading:
                tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
                model, report = AutoModelForCausalLM.from_pretrained(
                    directory, local_files_only=True, dtype=dtype, output_loading_info=True
                )
        except Exception as error:  # files of any making: whatever they break, the others are served on
            raise GiveUpError(f"the checkpoint cannot be loaded: {type(error).__name__}: {error}"[:500]) from error
        if missing := sorted(report["missing_keys"]):
            raise GiveUpError(f"the checkpoint lacks weights, {missing[0]} among {len(missing)}; they would be random")
        self.context_length = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.adapters = Adapters(model.to(self.device).eval(), self.device)
        self.versions = {"": _version("", tokenizer, model.generation_config)}
        self.running = Running(self._forward, self.device)
        self.forward_passes = 0
        self._waiting: deque[Row] = deque()
        self._leaving: set[str] = set()

    def add(self, name: str, directory: Path) -> None:
        """Load an adapter; asks may name it from now on. Raises GiveUpError for one that does not fit this base."""
        from transformers import AutoTokenizer

        base = self.versions[""]
        try:
            has_tokenizer = (directory / "tokenizer_config.json").exists()
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True) if has_tokenizer else None
        except Exception as error:  # files of any making
            raise GiveUpError(f"the adapter's tokenizer cannot be loaded: {error}"[:500]) from error
        version = _version(name, tokenizer or base.tokenizer, self.adapters.model.generation_config)
        with _loading:
            self.adapters.add(name, directory)
        self.versions[name] = version

    def remove(self, name: str) -> None:
        """Let an adapter go, at once or when the last row that is answered by it has left."""
        self._leaving.add(name)
        self._sweep()

    def turn(self, newcomers: Sequence[tuple[int, str, Ask]]) -> list[tuple[int, Piece | Answer]]:
        """Take in requests, each (its key, its adapter's name, what is asked), and give every row one more token.

        Those who join get their first. Returns what there is to tell, by key: each key's last is an Answer. Where the
        model raises while it goes on, all that it had is dropped; where it does on joining, who joined is refused.
        """
        try:
            return self._turn(newcomers)
        except Exception:
            self.running.clear()
            self._waiting.clear()
            raise
        finally:
            self._sweep()

    def _turn(self, newcomers: Sequence[tuple[int, str, Ask]]) -> list[tuple[int, Piece | Answer]]:
        said: list[tuple[int, Piece | Answer]] = []
        for key, name, ask in newcomers:
            row = self._row(key, self.versions[name], ask)
            if isinstance(row, Row):
                self._waiting.append(row)
            else:
                said.append((key, row))
        goes_on = self.running.rows
        joined = self._join()
        if self.running.rows:
            self.running.step()
        return said + [(row.key, news) for row in (*goes_on, *joined) if (news := row.news()) is not None]

    def answer(self, asks: Sequence[Ask], adapter: str = "") -> list[Answer]:
        """One answer each, in order: turns until the last of them is there."""
        found: dict[int, Answer] = {}
        newcomers = [(key, adapter, ask) for key, ask in enumerate(asks)]
        while len(found) < len(asks):
            found |= {key: news for key, news in self.turn(newcomers) if not isinstance(news, Piece)}
            newcomers = []
        return [found[key] for key in range(len(asks))]

    def score(self, name: str, ids: Sequence[int]) -> Scored | Refused:
        """How probable given tokens are. Refused where they, and one more, are more than the context, or unknown."""
        if len(ids) >= self.context_length:
            said = f"this model's context is {self.context_length} tokens and the prompt has {len(ids)}, one is drawn"
            return Refused(f"{said}; shorten it", "context_length_exceeded")
        if max(ids) >= self.vocabulary:
            return Refused(
                f"this model knows {self.vocabulary} tokens, and {max(ids)} is none of them", "invalid_prompt"
            )
        version = self.versions[name]
        read = partial(self.adapters.forward, [name])
        return scored(read, version, ids, self.vocabulary, self.device)

    def prompt_of(self, ask: Ask, tokenizer: Any) -> list[int]:
        """Token ids of the chat as the version's own template renders it.

        Control tokens in messages are encoded as plain text: a message cannot close its turn and open another's.
        Raises GiveUpError for messages that the template would not show whole.
        """
        ids: list[int] = tokenizer.apply_chat_template(
            for_template(tokenizer, ask.messages, ask.tools),
            tools=ask.tools,
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        return ids

    def _row(self, key: int, version: Version, ask: Ask) -> Row | Refused:
        try:
            prompt = self.prompt_of(ask, version.tokenizer)
        except GiveUpError as error:
            return Refused(str(error), "invalid_messages")
        except Exception as error:  # a template is a program of the model's maker: it may fail in any way
            return Refused(f"the model's chat template refuses these messages: {error}"[:300], "invalid_messages")
        if not prompt or max(prompt) >= self.vocabulary:
            return Refused("these messages become no tokens that the model knows", "invalid_messages")
        room = reply_room(len(prompt), ask.sampling.max_tokens or self.max_tokens, self.context_length)
        if room < 1:
            return Refused(
                f"this model's context is {self.context_length} tokens and the messages have {len(prompt)}; "
                f"shorten them",
                "context_length_exceeded",
            )
        # A reply's randomness is not a secret; a seeded one must come again.
        return Row(key, version, ask, prompt, room, random.Random(ask.sampling.seed))  # noqa: S311  # sampling, not cryptography

    def _join(self) -> list[Row]:
        """Have those who wait join as far as there is room; returns them."""
        if not self.running.takes_more:
            return []
        lengths = [row.at_most for row in self.running.rows]
        waiting = [row.at_most for row in self._waiting]
        count = joiners(lengths, waiting, self.batch_max, self.batch_tokens)
        rows = [self._waiting.popleft() for _ in range(count)]
        if rows:
            self._prefill(rows)
        return rows

    def _prefill(self, rows: list[Row]) -> None:
        """One pass for all; where it raises, one for each version, so that a broken one takes no other along."""
        try:
            self.running.join(rows)
        except Exception as error:
            versions = {row.version for row in rows}
            if len(versions) > 1:
                for version in versions:
                    self._prefill([row for row in rows if row.version is version])
                return
            logger().exception("prefill_failed", rows=len(rows))
            for row in rows:
                row.refuse(f"the model failed: {type(error).__name__}", "model_failed")

    def _forward(
        self, rows: Sequence[Row], ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> Any:
        self.forward_passes += 1
        return self.adapters.forward(
            [row.version.adapter for row in rows],
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _sweep(self) -> None:
        used = {row.version.adapter for row in (*self.running.rows, *self._waiting)}
        for name in self._leaving - used:
            self._leaving.discard(name)
            if self.versions.pop(name, None) is not None:
                self.adapters.remove(name)


def _version(adapter: str, tokenizer: Any, generation_config: Any) -> Version:
    if not tokenizer.chat_template:
        raise GiveUpError("the checkpoint has no chat template; chat completions need one")
    configured = generation_config.eos_token_id if generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    return Version(
        adapter, tokenizer, frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)
    )

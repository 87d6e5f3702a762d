"""A Hugging Face causal LM as a batch of chats: left-padded prompts, one KV cache, a row each request."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.inference.domain import Answer, Ask, FinishReason, Refused, Reply, cut_at_stop, passes, reply_room
from shared.chat import for_template
from shared.errors import GiveUpError

if TYPE_CHECKING:
    import torch


_loading = threading.Lock()  # from_pretrained patches torch's globals: two at a time lose weights


@dataclass
class _Row:
    """One request while it is being answered."""

    ask: Ask
    prompt: list[int]
    room: int
    random: random.Random
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: FinishReason | None = None
    broken: bool = False


class TorchModel:
    """One checkpoint in memory. ``answer`` is called from one thread at a time."""

    def __init__(self, directory: Path, *, device: str, batch_max: int, batch_tokens: int, max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.batch_max, self.batch_tokens, self.max_tokens = batch_max, batch_tokens, max_tokens
        try:
            with _loading:
                self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
                model, report = AutoModelForCausalLM.from_pretrained(
                    directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
                )
        except Exception as error:  # files of any making: whatever they break, the others are served on
            raise GiveUpError(f"the checkpoint cannot be loaded: {type(error).__name__}: {error}"[:500]) from error
        if missing := sorted(report["missing_keys"]):
            raise GiveUpError(f"the checkpoint lacks weights, {missing[0]} among {len(missing)}; they would be random")
        if not self.tokenizer.chat_template:
            raise GiveUpError("the checkpoint has no chat template; chat completions need one")
        self.model = model.to(self.device).eval()
        self.context_length = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
        self.ends = _end_tokens(model, self.tokenizer)
        self.calls_tools = "<tool_call>" in str(self.tokenizer.chat_template)
        self.forward_passes = 0

    def prompt_of(self, ask: Ask) -> list[int]:
        """Token ids of the chat as the model's own template renders it.

        Control tokens in messages are encoded as plain text: a message cannot close its turn and open another's.
        Raises GiveUpError for messages that the template would not show whole.
        """
        ids: list[int] = self.tokenizer.apply_chat_template(
            for_template(self.tokenizer, ask.messages, ask.tools),
            tools=ask.tools,
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        return ids

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer each, in order. A request that cannot be answered takes no neighbour along."""
        found: list[_Row | Refused] = [self._row(ask) for ask in asks]
        rows = [row for row in found if isinstance(row, _Row)]
        for indices in passes([len(row.prompt) for row in rows], self.batch_max, self.batch_tokens):
            self._generate([rows[i] for i in indices])
        return [self._reply(row) if isinstance(row, _Row) else row for row in found]

    def _row(self, ask: Ask) -> _Row | Refused:
        try:
            prompt = self.prompt_of(ask)
        except GiveUpError as error:
            return Refused(str(error), "invalid_messages")
        except Exception as error:  # a template is a program of the model's maker: it may fail in any way
            return Refused(f"the model's chat template refuses these messages: {error}"[:300], "invalid_messages")
        room = reply_room(len(prompt), ask.sampling.max_tokens or self.max_tokens, self.context_length)
        if room < 1:
            return Refused(
                f"this model's context is {self.context_length} tokens and the messages have {len(prompt)}; "
                f"shorten them",
                "context_length_exceeded",
            )
        # A reply's randomness is not a secret; a seeded one must come again.
        return _Row(ask, prompt, room, random.Random(ask.sampling.seed))  # noqa: S311  # sampling, not cryptography

    def _generate(self, rows: list[_Row]) -> None:
        import torch

        from services.inference.sampling import draw

        with torch.inference_mode():
            longest = max(len(row.prompt) for row in rows)
            padding = [longest - len(row.prompt) for row in rows]
            ids = self._tensor([[0] * pad + row.prompt for row, pad in zip(rows, padding, strict=True)])
            mask = self._tensor([[0] * pad + [1] * len(row.prompt) for row, pad in zip(rows, padding, strict=True)])
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            cache: Any = None
            while True:
                out = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                self.forward_passes += 1
                cache = out.past_key_values
                logprobs = self._distribution(rows, out.logits[:, -1].float())
                chosen = draw(logprobs, torch.tensor([row.random.random() for row in rows], device=self.device))
                drawn = logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
                for row, token, logprob in zip(rows, chosen.tolist(), drawn, strict=True):
                    self._append(row, token, logprob)
                live = [index for index, row in enumerate(rows) if row.finished is None]
                if not live:
                    return
                if len(live) < len(rows):
                    kept = self._tensor(live)
                    cache.batch_select_indices(kept)
                    rows, chosen, mask, positions = [rows[i] for i in live], chosen[kept], mask[kept], positions[kept]
                ids, positions = chosen[:, None], positions[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)

    def _distribution(self, rows: Sequence[_Row], logits: torch.Tensor) -> torch.Tensor:
        """Log probabilities (rows, vocabulary) of the next token of each row, as its request asks for them."""
        from services.inference.sampling import distribution, penalised

        asked = [row.ask.sampling for row in rows]
        for index, (row, sampling) in enumerate(zip(rows, asked, strict=True)):
            if sampling.penalises:
                logits[index] = penalised(
                    logits[index],
                    self._tensor(row.prompt),
                    self._tensor(row.token_ids).long(),
                    repetition=sampling.repetition_penalty,
                    presence=sampling.presence_penalty,
                    frequency=sampling.frequency_penalty,
                )
        temperature, top_p, min_p = (
            self._tensor([float(getattr(sampling, name)) for sampling in asked])
            for name in ("temperature", "top_p", "min_p")
        )
        return distribution(logits, temperature, top_p, self._tensor([sampling.top_k for sampling in asked]), min_p)

    def _append(self, row: _Row, token: int, logprob: float) -> None:
        if not -1e30 < logprob <= 1e-3:  # not a number: the weights are broken
            row.broken, row.finished = True, "stop"
            return
        row.token_ids.append(token)
        row.logprobs.append(min(logprob, 0.0))
        if token in self.ends or token in row.ask.sampling.stop_token_ids or self._says_stop(row):
            row.finished = "stop"
        elif len(row.token_ids) >= row.room or not row.ask.wanted():
            row.finished = "length"

    def _says_stop(self, row: _Row) -> bool:
        """Whether a stop string is in the reply; the tail that can hold a new one is looked at first."""
        stops = row.ask.sampling.stop
        if not stops:
            return False
        tail = 8 + max(len(stop.encode()) for stop in stops)
        return all(cut_at_stop(self._text(ids), stops)[1] for ids in (row.token_ids[-tail:], row.token_ids))

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _reply(self, row: _Row) -> Answer:
        if row.broken:
            return Refused("the model's probabilities are not numbers; its weights are broken", "model_broken")
        return Reply(
            prompt_token_ids=row.prompt,
            token_ids=row.token_ids,
            logprobs=row.logprobs,
            token_texts=[self.tokenizer.decode([token]) for token in row.token_ids],
            text=cut_at_stop(self._text(row.token_ids), row.ask.sampling.stop)[0],
            finish_reason=row.finished or "length",
            calls_tools=self.calls_tools,
        )

    def _tensor(self, values: Any) -> torch.Tensor:
        import torch

        return torch.tensor(values, device=self.device)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)

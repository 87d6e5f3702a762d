"""What a version says to a few prompts, kept beside its weights: whoever serves it is compared with who trained it.

``probe.json`` has token ids that the trainer's own model drew at temperature 1, with the log probability of each at
temperature 1. A server that is asked for those of the very same tokens answers the same, but for its arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.chat import for_template, rendered
from shared.errors import GiveUpError

FILE = "probe.json"
TOKENS = 16
CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Say hello."}],
    [{"role": "user", "content": "What is two and two?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is water wet?"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Name another."},
    ],
)


def write(model: Any, tokenizer: Any, directory: Path, seed: int, *, context: int) -> None:
    """Ask the model and keep what it says. A prompt that its template refuses is left out, all of them if need be.

    The caller's random state stays as it was. Raises GiveUpError where the model's probabilities are not numbers.
    """
    asked = [(chat, ids) for chat in CHATS if (ids := _prompt(tokenizer, chat)) and len(ids) + TOKENS <= context]
    replies = _drawn(model, [ids for _, ids in asked], _ends(model, tokenizer), seed) if asked else []
    prompts = [
        {"messages": chat, "prompt_token_ids": ids, "token_ids": tokens, "logprobs": logprobs}
        for (chat, ids), (tokens, logprobs) in zip(asked, replies, strict=True)
    ]
    (directory / FILE).write_text(json.dumps({"prompts": prompts}) + "\n")


def _prompt(tokenizer: Any, chat: list[dict[str, Any]]) -> list[int]:
    """Its token ids, or none where there is no template that shows it."""
    if not tokenizer.chat_template:
        return []
    try:
        text, _ = rendered(tokenizer, for_template(tokenizer, chat), prompt=True)
    except GiveUpError:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _ends(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


def _drawn(model: Any, prompts: Sequence[list[int]], ends: set[int], seed: int) -> list[tuple[list[int], list[float]]]:
    """Of each prompt up to ``TOKENS`` tokens, drawn by the seed, and their log probabilities: one padded batch."""
    import torch

    source = torch.Generator().manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    cache: Any = None
    for _ in range(TOKENS):
        with torch.inference_mode():
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        cache, logprobs = out.past_key_values, out.logits[:, -1].float().log_softmax(-1).cpu()
        if not logprobs.isfinite().any(-1).all():
            raise GiveUpError("the trained model's probabilities are not numbers; lower the learning rate")
        chosen = torch.multinomial(logprobs.exp(), 1, generator=source)
        for (tokens, values), token, at in zip(rows, chosen[:, 0].tolist(), logprobs, strict=True):
            if not tokens or tokens[-1] not in ends:
                tokens.append(token)
                values.append(float(at[token]))
        if all(tokens[-1] in ends for tokens, _ in rows):
            break
        ids, positions = chosen.to(model.device), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return rows

"""A policy that could learn to break its own runs to escape a bad grade does not: breaking loses advantage."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from services.trainer.domain import CallRecord, Judged, Ready, ScoredGroup, Terms, plan
from services.trainer.reading_domain import reading

CALL = CallRecord(
    [],
    {"message": {"role": "assistant", "content": "?"}},
    prompt_token_ids=[1],
    token_ids=[2],
    logprobs=[-1.0],
    model_version="v0",
    witnessed=True,
)
UNPARSED = replace(CALL, response=None, token_ids=None, logprobs=None)  # what the broken call left of itself
GOOD, BAD, BREAK = range(3)
CALLS = {GOOD: [CALL], BAD: [CALL], BREAK: [CALL, UNPARSED]}
SCORES = {GOOD: 1.0, BAD: 0.5, BREAK: 0.0}  # who broke its own run ranks last


def shares(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def learned(rounds: int, *, break_is_left_out: bool) -> list[float]:
    """What a policy of three choices comes to, moved by the advantages that a batch trains on."""
    draw, logits = random.Random(1), [-2.0, 0.0, 0.0]
    for number in range(rounds):
        chosen = [draw.choices(range(3), shares(logits), k=8) for _ in range(4)]
        if break_is_left_out:
            chosen = [[choice for choice in group if choice != BREAK] for group in chosen]
        by_run = {(f"a{n}", f"{g}-{n}"): choice for g, group in enumerate(chosen) for n, choice in enumerate(group)}
        groups = [
            ScoredGroup(
                f"{number}-{g}",
                1,
                True,
                tuple(
                    Judged(f"a{n}", f"{g}-{n}", SCORES[choice], None, reading(CALLS[choice]))
                    for n, choice in enumerate(group)
                ),
            )
            for g, group in enumerate(chosen)
        ]
        found = plan(groups, Terms("v0", {"v0": 0}, min_groups=1, min_agents=1))
        if isinstance(found, Ready):
            chances = shares(logits)
            for entry in found.entries:
                if entry.left_out is None:
                    choice = by_run[entry.agent_id, entry.trajectory_id]
                    for other in range(3):
                        logits[other] += 0.02 * entry.advantage * ((other == choice) - chances[other])
    return shares(logits)


def test_a_policy_does_not_learn_to_break_itself() -> None:
    kept, left_out = learned(40, break_is_left_out=False), learned(40, break_is_left_out=True)
    assert kept[BREAK] < 0.1
    assert kept[GOOD] > 0.7
    assert left_out[BREAK] > 4 * kept[BREAK], "what leaves training is a way out"


def test_a_member_without_tokens_of_use_counts_in_the_others_advantage() -> None:
    members = [
        Judged("a", "a", 1.0, None, reading([CALL])),
        Judged("b", "b", 0.6, None, reading([CALL])),
        Judged("c", "c", 0.0, None, reading([UNPARSED])),
    ]
    found = plan([ScoredGroup("g", 1, True, tuple(members))], Terms("v0", {"v0": 0}, min_groups=1, min_agents=1))
    assert isinstance(found, Ready)
    assert [entry.left_out is None for entry in found.entries] == [True, True, False]
    assert found.entries[1].advantage > 0, "against the broken one, which is not trained on, it did well"

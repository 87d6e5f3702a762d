from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.domain import (
    ByGradient,
    ByImitation,
    CallRecord,
    Carries,
    Empty,
    Failures,
    Gate,
    Judged,
    Never,
    NotYet,
    Ready,
    ScoredGroup,
    Terms,
    Wait,
    advantages,
    carries,
    drop_out,
    holds,
    next_version,
    plan,
)
from services.trainer.reading_domain import reading

EXACT = CallRecord(
    messages=[{"role": "user", "content": "?"}],
    response={"message": {"role": "assistant", "content": "buy"}},
    prompt_token_ids=[1, 2],
    token_ids=[3],
    logprobs=[-0.5],
    temperature=1.0,
    top_p=None,
    model_version="v3",
    witnessed=True,
)
WORDS = CallRecord(messages=EXACT.messages, response=EXACT.response)
TERMS = Terms("v3", {f"v{n}": n for n in range(6)}, max_lag=1, min_groups=2, min_agents=2)


def member(*calls: CallRecord, agent: str = "a", score: float = 1.0, reward: float | None = 1.0) -> Judged:
    return Judged(agent, f"run-{agent}", score, reward, reading(calls))


def group(*members: Judged, name: str = "g", homogeneous: bool = True) -> ScoredGroup:
    return ScoredGroup(name, 1, homogeneous, members)


def verdict(*calls: CallRecord, homogeneous: bool = True, spread: bool = True, reward: float | None = 1.0) -> Carries:
    one = member(*calls, reward=reward)
    other = member(*calls, agent="b", score=0.0 if spread else 1.0)
    return carries(one, group(one, other, homogeneous=homogeneous), TERMS)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, ByGradient("exact")),
        ({"temperature": None}, ByGradient("exact")),
        ({"model_version": "v2"}, ByGradient("stale")),
        ({"model_version": "v4"}, ByGradient("stale")),
        ({"model_version": "v1"}, Never("stale", "it is 2 versions away from v3, over max_lag 1")),
        ({"model_version": "gpt"}, Never("mixed", "gpt is no version of this line")),
        ({"model_version": None}, Never("mixed", "None is no version of this line")),
        ({"temperature": 0.7}, ByGradient("exact")),
        ({"temperature": 0.0}, ByImitation()),
        ({"top_p": 0.9}, ByImitation()),
        ({"sampling": {"temperature": 1, "top_k": 20}}, ByImitation()),
        ({"prompt_token_ids": None}, ByImitation()),
        ({"token_ids": None}, ByImitation()),
        ({"logprobs": None}, ByImitation()),
        ({"logprobs": [-0.5, -0.5]}, ByImitation()),
        ({"logprobs": [float("nan")]}, ByImitation()),
        ({"fault": "response.logprobs is a list"}, ByImitation()),
        ({"witnessed": False}, ByImitation()),
    ],
)
def test_one_call_decides_what_its_run_can_carry(changes: dict[str, object], want: Carries) -> None:
    changed = replace(EXACT, **changes)  # type: ignore[arg-type]  # each case names its own field
    assert verdict(changed) == want
    if want != ByGradient("exact") and changed.response:
        assert verdict(EXACT, changed) == want


def test_a_run_of_words_and_tokens_is_mixed() -> None:
    reason = "a call of it lacks token ids or finite logprobs; to be imitated, it has no reward of record"
    assert verdict(EXACT, WORDS, reward=None) == NotYet("mixed", reason)
    assert verdict() == Never("mixed", "no model call of it is stored")
    assert verdict(replace(EXACT, response=None)) == Never("mixed", "a reply of it was not recorded")


def test_tokens_of_no_use_are_imitated_only_where_that_is_honest() -> None:
    cold = replace(EXACT, temperature=0.0)
    assert verdict(cold, reward=0.5) == Never(
        "mixed",
        "it was sampled with temperature 0: send temperature 1; to be imitated, its reward of record 0.5 is under 1",
    )
    halved = verdict(cold, replace(EXACT, response=None))
    assert halved == Never("mixed", "a reply of it was not recorded"), "what is imitated is whole"


def test_what_an_agent_claims_is_a_gradient_only_where_a_setting_trusts_it() -> None:
    claimed = replace(EXACT, witnessed=False)
    one, other = member(claimed, reward=0.0), member(claimed, agent="b", score=0.0)
    found = carries(one, group(one, other), TERMS)
    assert isinstance(found, Never)
    assert "RATCHET_TRUST_AGENT_TOKENS" in found.reason
    assert carries(one, group(one, other), replace(TERMS, trust_agent_tokens=True)) == ByGradient("exact")


def test_nothing_that_a_quarantined_version_answered_is_trained_on() -> None:
    terms = replace(TERMS, quarantined={"v2": "worse"})
    for calls in ([replace(EXACT, model_version="v2")], [replace(WORDS, model_version="v2")]):
        one, other = member(*calls), member(WORDS, agent="b", score=0.0)
        assert carries(one, group(one, other), terms) == Never("mixed", "v2 is quarantined: worse")
        assert carries(other, group(one, other), terms) != Never("mixed", "v2 is quarantined: worse")


def test_what_training_could_not_use_is_left_out_for_good() -> None:
    one = replace(member(EXACT), barred="its gradient is not finite")
    assert carries(one, group(one, member(EXACT, agent="b", score=0.0)), TERMS) == Never("mixed", one.barred or "")


def test_what_a_badly_recorded_window_holds_waits() -> None:
    members = (member(EXACT), member(EXACT, agent="b", score=0.0))
    terms = replace(TERMS, min_quality=0.95)
    for quality, want in ((None, ByGradient("exact")), (0.95, ByGradient("exact")), (0.9, None)):
        found = carries(members[0], replace(group(*members), quality=quality), terms)
        assert found == (want or NotYet("mixed", "its window's quality 0.900 is under 0.95"))


def test_a_call_that_broke_takes_no_tokens_away_from_the_others() -> None:
    assert verdict(EXACT, replace(EXACT, response=None, token_ids=None, logprobs=None)) == ByGradient("exact")


def test_pauses_double_with_each_failure_up_to_an_hour() -> None:
    at = datetime(2026, 11, 20, tzinfo=UTC)
    waits = [(Failures(n, "b", "why", at).again_at(30) - at).total_seconds() for n in (1, 2, 3, 10, 2000)]
    assert waits == [30, 60, 120, 3600, 3600]


def test_only_what_an_outcome_calls_good_is_imitated() -> None:
    assert verdict(WORDS) == ByImitation()
    assert verdict(WORDS, reward=0.5) == Never("imitation", "its reward of record 0.5 is under 1")
    assert verdict(WORDS, reward=None) == NotYet("imitation", "it has no reward of record")
    assert verdict(WORDS, homogeneous=False) == verdict(WORDS)  # nothing is compared
    assert verdict(WORDS, spread=False) == Never("imitation", "its group has no spread")


scores = st.lists(st.floats(0, 1, width=16), min_size=2, max_size=8)


@given(scores, st.booleans())
def test_advantages_are_the_written_out_ones(values: list[float], homogeneous: bool) -> None:
    array = np.array(values)
    if array.max() == array.min():
        want = np.zeros(len(values))
    elif homogeneous:
        want = (array - array.mean()) / (array.std() + 1e-4)
    else:
        want = np.array([array[i] - np.delete(array, i).mean() for i in range(len(values))])
    np.testing.assert_allclose(advantages(values, homogeneous), want, atol=1e-9)
    assert sum(advantages(values, homogeneous)) == pytest.approx(0, abs=1e-6)


def test_a_group_of_one_has_no_advantage() -> None:
    assert advantages([1.0], True) == [0.0]
    assert not ScoredGroup("g", 1, True, ()).has_spread()


def test_what_holds_the_next_batch_back() -> None:
    assert holds(Gate("p", "v1")) == []
    assert len(holds(Gate("p", None, "v2", "batch-1", "v3"))) == 4


def pair(name: str, good: CallRecord, bad: CallRecord, **more: object) -> ScoredGroup:
    return group(
        member(good, agent="a", score=1.0, **more),  # type: ignore[arg-type]  # reward alone is passed on
        member(bad, agent="b", score=0.0, reward=0.0),
        name=name,
    )


def test_a_batch_trains_by_gradient_where_enough_groups_can() -> None:
    lost = replace(EXACT, model_version="v0")
    groups = [
        pair("g1", EXACT, EXACT),
        pair("g2", EXACT, lost),
        pair("words", WORDS, WORDS),
        pair("old", lost, lost),
        pair("open", WORDS, WORDS, reward=None),
    ]
    ready = plan(groups, TERMS)
    assert isinstance(ready, Ready)
    assert ready.method == "grpo"
    held = [(entry.group_id, entry.agent_id, entry.left_out is None) for entry in ready.entries]
    assert held == [
        ("g1", "a", True),
        ("g1", "b", True),
        ("g2", "a", True),
        ("g2", "b", False),
        ("old", "a", False),
        ("old", "b", False),
    ]
    assert [entry.advantage for entry in ready.entries][:2] == advantages([1.0, 0.0], True)


def test_a_batch_imitates_where_no_gradient_can_be_had() -> None:
    # two groups hold exact tokens: too few for a gradient, and the one without words stays for a later batch
    mixed = group(member(WORDS, agent="c"), member(EXACT, agent="d", score=0.0), name="both")
    groups = [pair("g1", WORDS, WORDS), pair("g2", EXACT, EXACT), pair("g3", WORDS, WORDS), mixed]
    ready = plan(groups, replace(TERMS, min_groups=3))
    assert isinstance(ready, Ready)
    assert ready.method == "imitation"
    assert [(e.group_id, e.agent_id, e.left_out) for e in ready.entries] == [
        ("g1", "a", None),
        ("g1", "b", "its reward of record 0 is under 1"),
        ("g3", "a", None),
        ("g3", "b", "its reward of record 0 is under 1"),
        ("both", "c", None),
        ("both", "d", "the batch imitates"),
    ]


def test_words_in_a_gradient_batch_say_why_they_are_left_out() -> None:
    both = group(member(EXACT, agent="a"), member(WORDS, agent="b", score=0.0), name="both")
    ready = plan([both, pair("g", EXACT, EXACT)], TERMS)
    assert isinstance(ready, Ready)
    assert ready.entries[1].left_out == "the batch trains by gradient"


def test_what_is_missing_is_said() -> None:
    assert plan([pair("g1", EXACT, EXACT)], TERMS) == Wait(("grpo: 1 of 2 groups", "imitation: 0 of 2 groups"))
    alone = [group(member(EXACT), member(WORDS, score=0.0), name=str(n)) for n in range(2)]
    assert plan(alone, TERMS) == Wait(("grpo: 1 of 2 agents", "imitation: 1 of 2 agents"))


def test_groups_in_which_nothing_can_be_trained_are_recorded() -> None:
    lost = replace(EXACT, model_version="other")
    empty = plan([pair("g1", lost, lost), pair("g2", lost, lost), pair("g3", WORDS, WORDS, reward=None)], TERMS)
    assert isinstance(empty, Empty)
    assert {entry.group_id for entry in empty.entries} == {"g1", "g2"}
    assert all(entry.left_out for entry in empty.entries)


@given(st.floats(0, 0.99), st.text())
def test_dropout_is_repeatable_and_leaves_something(rate: float, seed: str) -> None:
    ready = plan([pair(f"g{n}", EXACT, EXACT) for n in range(10)], TERMS)
    assert isinstance(ready, Ready)
    dropped = drop_out(ready.entries, rate, seed)
    assert dropped == drop_out(ready.entries, rate, seed)
    assert any(entry.left_out is None for entry in dropped)
    assert [replace(entry, left_out=None) for entry in dropped] == list(ready.entries)
    if rate == 0:
        assert dropped == ready.entries


PAID = replace(TERMS, parent="v0", endpoints=frozenset({"v0"}))
TOKENS_ELSEWHERE = replace(EXACT, model_version="v0")


def judged_under(terms: Terms, call: CallRecord, reward: float | None = 1.0) -> Carries:
    one = member(call, reward=reward)
    return carries(one, group(one, member(WORDS, agent="b", score=0.0)), terms)


def test_what_an_endpoint_answered_is_imitated_whatever_tokens_it_gave() -> None:
    assert judged_under(PAID, replace(WORDS, model_version="v0")) == ByImitation()
    assert judged_under(PAID, TOKENS_ELSEWHERE) == ByImitation()
    assert judged_under(PAID, TOKENS_ELSEWHERE, reward=0.0) == Never(
        "mixed", "the tokens of v0 are of another vocabulary; to be imitated, its reward of record 0 is under 1"
    )


def test_what_a_version_of_ours_answered_on_its_trial_against_an_endpoint_is_not_over() -> None:
    own = replace(EXACT, model_version="v1")
    assert judged_under(PAID, own) == ByImitation()
    found = judged_under(PAID, own, reward=0.0)
    assert isinstance(found, NotYet)
    assert (found.label, found.reason[:14]) == ("stale", "v1 answered it")
    assert judged_under(replace(PAID, parent="v1"), own, reward=0.0) == ByGradient("exact")
    assert judged_under(PAID, replace(EXACT, model_version="gpt")) == Never("mixed", "gpt is no version of this line")
    broken = member(own, replace(own, response=None), reward=1.0)
    assert isinstance(carries(broken, group(broken, member(WORDS, agent="b", score=0.0)), PAID), NotYet)


def test_once_a_version_of_ours_is_best_the_endpoint_teaches_no_more() -> None:
    after = replace(PAID, parent="v1")
    for call in (TOKENS_ELSEWHERE, replace(WORDS, model_version="v0")):
        reason = "v0 answered it, an endpoint that v1 has taken over from"
        assert judged_under(after, call) == NotYet("imitation", reason)


def test_a_student_imitates_and_nothing_else() -> None:
    groups = [pair(name, TOKENS_ELSEWHERE, TOKENS_ELSEWHERE) for name in ("g1", "g2")]
    ready = plan(groups, replace(PAID, min_agents=1))
    assert isinstance(ready, Ready)
    assert ready.method == "imitation"
    assert [entry.left_out is None for entry in ready.entries] == [True, False, True, False]
    assert plan(groups[:1], PAID) == Wait(("imitation: 1 of 2 groups",))


def test_an_endpoint_without_a_student_holds_the_next_batch_back() -> None:
    [reason] = holds(Gate("p", "v0", no_student=True))
    assert "register a student with `ratchet base register DIR --policy p`" in reason


def test_versions_are_numbered() -> None:
    assert next_version(3) == "v3"

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.trainer.domain import CallRecord
from services.trainer.learning.sequences import conversations, token_sequences


def exact(prompt: list[int], reply: list[int]) -> CallRecord:
    said = {"message": {"role": "assistant"}}
    return CallRecord([], said, prompt_token_ids=prompt, token_ids=reply, logprobs=[-float(t) for t in reply])


def test_a_call_that_extends_another_continues_its_sequence() -> None:
    [one, other] = token_sequences([exact([1, 2], [3]), exact([9], [8]), exact([1, 2, 3, 4], [5, 6])])
    assert other.ids == (1, 2, 3, 4, 5, 6)
    assert other.own == (False, False, True, False, True, True)
    assert other.logprobs == (0.0, 0.0, -3.0, 0.0, -5.0, -6.0)
    assert one.ids == (9, 8)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=2)
        ),
        max_size=6,
    )
)
def test_every_reply_token_is_trained_on_once(pairs: list[tuple[list[int], list[int]]]) -> None:
    calls = [exact(prompt, reply) for prompt, reply in pairs]
    found = token_sequences(calls)
    assert sum(sum(sequence.own) for sequence in found) == sum(len(reply) for _, reply in pairs)
    own = sorted(-lp for s in found for lp, mine in zip(s.logprobs, s.own, strict=True) if mine)
    assert own == sorted(float(token) for _, reply in pairs for token in reply)


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_a_conversation_counts_each_reply_once_and_no_other_assistants() -> None:
    first = [said("user", "hi"), said("assistant", "an example"), said("user", "now you")]
    reply, second = said("assistant", "one"), said("assistant", "two")
    calls = [
        CallRecord(first, {"message": reply}),
        CallRecord([said("user", "aside")], {"message": reply}),
        CallRecord([*first, reply, said("user", "more")], {"message": second}),
    ]
    [aside, whole] = conversations(calls)
    assert whole.messages == (*first, reply, said("user", "more"), second)
    assert whole.own == {3, 5}
    assert (len(aside.messages), aside.own) == (2, {1})

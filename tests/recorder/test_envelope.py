"""The recorder's quick reader takes nothing that the wire contract refuses, and makes the same of what both take."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import from_json
from ratchet_sdk.events import step_events

from services.recorder import envelope
from shared.bodies import finite
from shared.errors import GiveUpError
from tests.recorder.events import call_made, encoded, ended, reply, started, step

EVENTS = [
    started(
        scenario_id="sunny",
        goal="earn",
        model={"name": "traders", "version": "v1"},
        metadata={"a": [1, {"b": 2}]},
        expects=["reward", "price:IRON"],
    ),
    step(
        0,
        environment={"price": 1.5},
        provider_accesses=[{"provider": "news", "query": ["tea"], "data": {"n": 1}}],
        llm_calls=[{"call_id": "c", "messages": [{"role": "user", "content": "é"}], "response": reply(), "seed": 7}],
        action={"type": "buy", "parameters": {"n": 1}, "success": True, "result": {"ok": 1}, "reasoning": "r"},
        reward=-0.25,
    ),
    call_made("c", messages=[{"role": "user", "content": "x"}], prompt_token_ids=[1, 2], temperature=0.5, tools=[{}]),
    ended(final={"balance": 1.0}, metrics={"pnl": None}),
]
TAKEN = [encoded(event) for event in EVENTS]


def verdict(read: Any, content: bytes) -> str | None:
    """What was made of it, in words, since NaN is not equal to itself; None where it was refused."""
    try:
        return repr(read(content))
    except (ValidationError, ValueError, ArithmeticError, RecursionError, GiveUpError):
        return None


def by_pydantic(content: bytes) -> envelope.StepEvent | None:
    """As the recorder's second reader does it, which has the last word."""
    model = step_events.validate_json(content)
    if not_finite(from_json(content)):
        raise GiveUpError("not finite")
    return envelope.of(model) if "event_id" in model.model_fields_set else None


def not_finite(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(not_finite(item) for item in inner)


BEYOND = st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "-1E+400", "9" * 400 + ".0", "9" * 250 + "e99"])


@given(st.sampled_from(TAKEN), BEYOND, st.data())
def test_a_number_that_no_float_holds_is_refused_wherever_it_stands(
    content: bytes, number: str, data: st.DataObject
) -> None:
    """In free fields too, where pydantic takes it: nothing that is stored stumbles when it is read or written on."""
    event = json.loads(content)
    place = data.draw(st.sampled_from(list(objects_of(event))))
    place[data.draw(st.sampled_from([*place, "extra"]))] = data.draw(st.sampled_from(["HERE", ["HERE"], {"a": "HERE"}]))
    assert verdict(envelope.read, json.dumps(event).replace('"HERE"', number).encode()) is None


@given(st.sampled_from(["say NaN", "1e999", "-Infinity", "9" * 400]), st.integers(10**200, 10**310))
def test_a_text_and_a_large_integer_are_no_such_number(text: str, large: int) -> None:
    content = TAKEN[0].replace(b'"goal":"earn"', json.dumps({"goal": text, "n": large})[1:-1].encode())
    assert envelope.read(content) is not None
    assert finite(content) is content


@pytest.mark.parametrize("content", TAKEN)
def test_what_the_sdk_sends_is_read_the_quick_way(content: bytes) -> None:
    assert envelope._quickly(content) == by_pydantic(content) is not None
    assert envelope.read(content).kind == json.loads(content)["kind"]  # type: ignore[union-attr]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["v1", "1", "1.5", "true", "2026-11-24", "2026-11-20T10:00:01+05:30", "2026-11-20 10:00:01.1234567Z"]
    )
    | st.sampled_from(["action", "step", "llm_call", "trajectory.ended", "completed", 1.0, 0, -1, 2**31, "t\n"])
    | st.lists(st.sampled_from(["reward", "reward\n", "price:a", "price:", "fact:a\n", "luck", 1]), max_size=3)
    | st.just(["reward"] * 32)
    | st.just(["reward"] * 33),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """An event of the contract with some of its values replaced, removed or added, anywhere in it."""
    event = json.loads(draw(st.sampled_from(TAKEN)))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(objects_of(event))))
        name = draw(
            st.sampled_from([*place, "schema_", "schema", "event_id", "extra", "reward", "temperature", "expects"])
        )
        if draw(st.booleans()):
            place[name] = draw(VALUES)
        else:
            place.pop(name, None)
    return json.dumps(event, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


def objects_of(value: Any) -> Any:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects_of(inner)


@given(changed())
def test_both_readers_agree(content: bytes) -> None:
    assert verdict(envelope.read, content) == verdict(by_pydantic, content)


@given(st.sampled_from(TAKEN), st.data())
def test_both_readers_agree_on_damaged_bytes(content: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(content)))
    cut = data.draw(st.integers(0, 3))
    put = data.draw(
        st.binary(max_size=3) | st.sampled_from([b"\\ud800", b"NaN", b"1e999", b"\\u0000", b'"kind":"step",'])
    )
    damaged = content[:at] + put + content[at + cut :]
    assert verdict(envelope.read, damaged) == verdict(by_pydantic, damaged)


PLACE = b'"metadata":{'
HARD = {
    "nested deeper than pydantic goes": PLACE + b'"deep":' + b"[" * 205 + b"]" * 205 + b",",
    "a number of too many digits": PLACE + b'"n":' + b"9" * 4400 + b",",
    "half a surrogate": PLACE + b'"s":"\\ud800",',
    "not UTF-8": PLACE + b'"s":"\xff",',
    "a key twice": PLACE + b'"s":1,"s":2,',
    "infinity": PLACE + b'"s":1e999,',
}


@pytest.mark.parametrize("hard", HARD.values(), ids=HARD)
def test_both_readers_agree_where_parsers_differ(hard: bytes) -> None:
    content = TAKEN[0].replace(PLACE, hard)
    assert content != TAKEN[0]
    assert verdict(envelope.read, content) == verdict(by_pydantic, content)


@pytest.mark.parametrize(
    "at", ["10:00:01.1234567Z", "10:00:01.9999999+02:00", "10:00:01-00:00", "24:00:00Z", "10:00:60Z"]
)
def test_both_readers_agree_on_times(at: str) -> None:
    content = TAKEN[0].replace(b"10:00:01Z", at.encode())
    assert content != TAKEN[0]
    assert verdict(envelope.read, content) == verdict(by_pydantic, content)

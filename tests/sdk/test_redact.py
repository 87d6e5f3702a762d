"""What leaves: no secret of a known kind, every other byte as it was, and in time linear in the text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratchet_sdk import redact
from ratchet_sdk.redact import KINDS, Redaction, Redactor, secrets

KEY = "sk-proj-" + "a1B2" * 6
SAMPLES = {
    f"use {KEY} for it": "use [key] for it",
    "AKIA" + "ABCD1234" * 2: "[key]",
    "ghp_" + "a" * 36 + " pushed": "[key] pushed",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----\n": "[key]\n",
    "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJ": "[token]",
    "Authorization: Bearer abcdef.012345-xyz": "Authorization: [token]",
    "postgresql://ratchet:hunter22@db:5432/x": "postgresql://[password]@db:5432/x",
    "password = hunter22hunter": "[password]",
    "export MY_DB_PASSWORD=hunter22hunter": "export [password]",
    '{"client_secret": "hunter22", "n": 1}': '{"[password]", "n": 1}',
    "AWS_SECRET_ACCESS_KEY: aaaabbbbcccc": "[password]",
    "write to jane.doe+x@mail.example.co.uk, please": "write to [email], please",
    "4222222222222": "[card]",
    "4111 1111 1111 1111 and 4111-1111-1111-1111": "[card] and [card]",
}
HARMLESS = [
    "4111111111111112",  # its Luhn sum is wrong
    "1763653000000000000",
    "0000000000000000",
    "0x84114111111111111111af and a4111111111111111",  # a part of a hash
    "4111111111111111f",
    "2026-11-20T15:42:03.064061Z",
    "01a1f99f-3538-77e4-aaca-caae50394150",
    "a task-force of 12 @ noon, 5 tokens: fine, password: no",
    "risk-adjusted-return-of-the-portfolio",
    "[key] [email]",
]


def redacted(data: bytes, redactor: Redactor | None) -> bytes:
    return Redaction(redactor)(data)


@pytest.mark.parametrize(("text", "expected"), SAMPLES.items())
def test_secrets_are_replaced_by_their_kind(text: str, expected: str) -> None:
    assert secrets(text) == expected
    assert secrets(expected) == expected


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert secrets(text) == text


def test_every_text_of_an_event_is_seen_and_its_place_is_kept() -> None:
    event = {
        "schema": 1,
        "event_id": "01a1f99f-3538-77e4-aaca-caae50394150",
        "trajectory_id": "4111111111111111",
        "started_at": "2026-11-20T15:42:03Z",
        "environment": {f"line\n{KEY}": [{"deep": f"\u00e9\n\u0001{KEY}\ttab"}], "number": 4111111111111111},
        "llm_calls": [{"call_id": "4111111111111111", "messages": [{"content": "me@example.org"}]}],
    }
    clean = json.loads(redacted(json.dumps(event).encode(), secrets))
    assert clean["environment"] == {"line\n[key]": [{"deep": "é\n\x01[key]\ttab"}], "number": 4111111111111111}
    assert clean["llm_calls"] == [{"call_id": "4111111111111111", "messages": [{"content": "[email]"}]}]
    assert {name: clean[name] for name in list(event)[:4]} == dict(list(event.items())[:4])


def test_a_name_that_places_an_event_keeps_nothing_safe_elsewhere() -> None:
    """``kind``, ``policy``, ``schema``, ``call_id`` are ordinary names in what an agent hands over."""
    names = ["kind", "policy", "schema", "event_id", "trajectory_id", "started_at", "call_id", "base_call_id"]
    hidden = dict.fromkeys(names, KEY)
    event = {
        "kind": "step",
        "environment": hidden,
        "action": {"parameters": hidden},
        "llm_calls": [{"call_id": "c", "messages": [hidden], "tools": [hidden]}],
    }
    for escaped in ("", "\n"):
        clean = json.loads(redacted(json.dumps({**event, "note": escaped}).encode(), secrets))
        assert KEY not in json.dumps(clean)
        assert (clean["kind"], clean["llm_calls"][0]["call_id"]) == ("step", "c")


@pytest.mark.parametrize("note", ["", "\n"])  # an escape sends the event the longer way
def test_a_field_whose_name_says_what_it_holds_is_emptied(note: str) -> None:
    event = {
        "note": note,
        "environment": {"password": "correct horse", "db": {"API-Key": "aaaabbbbcccc"}, "passwords_tried": 3},
        "action": {"parameters": {"secret": "[password]", "text": "hunter22"}},
    }
    clean = json.loads(redacted(json.dumps(event).encode(), secrets))
    assert clean["environment"] == {"password": "[password]", "db": {"API-Key": "[password]"}, "passwords_tried": 3}
    assert clean["action"] == event["action"]


def test_tokens_do_not_spell_out_what_was_replaced() -> None:
    def event(run: str, *contents: str) -> dict[str, Any]:
        calls = [
            {
                "call_id": "c",
                "prompt_token_ids": [1, 2],
                "messages": [{"role": "user", "content": content}],
                "response": {"token_ids": [3], "logprobs": {"content": [{"token": "sk-"}]}, "finish_reason": "stop"},
            }
            for content in contents
        ]
        return {"trajectory_id": run, "llm_calls": calls}

    redaction = Redaction(secrets)

    def told(value: dict[str, Any]) -> list[tuple[bool, bool, bool]]:
        calls = json.loads(redaction(json.dumps(value).encode()))["llm_calls"]
        return [("prompt_token_ids" in c, "token_ids" in c["response"], "logprobs" in c["response"]) for c in calls]

    whole, bare = (True, True, True), (False, False, False)
    assert told(event("a", "hello", "there")) == [whole, whole]
    assert told(event("a", "hello", KEY)) == [bare, bare]
    assert told(event("a", "after it")) == [bare]  # its prompt's tokens hold the calls before it
    assert told(event("b", "another run")) == [whole]
    beside = event("d", KEY)
    beside["llm_calls"][0]["other_choices"] = [beside["llm_calls"][0]["response"]]
    [call] = json.loads(redaction(json.dumps(beside).encode()))["llm_calls"]
    assert call["other_choices"] == [{"finish_reason": "stop"}]
    single = {"trajectory_id": "c", "call": event("", KEY)["llm_calls"][0]}
    assert "prompt_token_ids" not in json.loads(redaction(json.dumps(single).encode()))["call"]


@given(
    st.dictionaries(
        st.text(), st.recursive(st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(), st.lists)
    )
)
def test_what_comes_out_is_json_and_what_had_no_secret_is_the_same_bytes(event: dict[str, object]) -> None:
    data = json.dumps(event).encode()
    once = redacted(data, secrets)
    json.loads(once)
    assert redacted(data, None) is data
    assert redacted(data, lambda text: text) is data
    assert redacted(data, str.upper) == data or json.loads(redacted(data, str.upper)) != event


ARABIC = "4111 1111 1111 1111".translate({ord("0") + n: 0x660 + n for n in range(10)})
PARTS = st.one_of(
    st.sampled_from([*SAMPLES, *HARMLESS, "\ud800", ARABIC, "1234 1234", "\\", "\n", '"', "/", "\u212a"]),
    st.sampled_from([word for _, words, _ in KINDS for word in words]).map(lambda word: word.upper() + "a" * 20),
    st.text(max_size=3),
)


@given(st.lists(PARTS, max_size=4).map("".join))
def test_what_is_not_looked_at_closely_has_no_secret(text: str) -> None:
    quick = secrets(text)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(redact, "suspect", lambda text: True)
        assert secrets(text) == quick


@given(st.lists(PARTS, max_size=4).map("".join), st.booleans())
def test_an_event_is_looked_at_as_its_texts_are(text: str, ascii_only: bool) -> None:
    text = text.encode("utf-8", "replace").decode()
    data = json.dumps({"environment": {"x": text}}, ensure_ascii=ascii_only).encode()
    assert json.loads(redacted(data, secrets))["environment"]["x"] == secrets(text)


@pytest.mark.parametrize("spelt", ["\\u0073k-proj-", "s\\u006b-proj-"])
def test_a_secret_that_is_spelt_with_escapes_is_found(spelt: str) -> None:
    data = b'{"environment":{"x":"%b"}}' % (spelt + "a1B2" * 6).encode()
    assert json.loads(redacted(data, secrets)) == {"environment": {"x": "[key]"}}
    address = rb'{"environment":{"x":"postgresql:\/\/ratchet:hunter22@db/x"}}'
    assert json.loads(redacted(address, secrets)) == {"environment": {"x": "postgresql://[password]@db/x"}}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "evil",
    ["@a.b", "1 ", "1", "eyJ", "://", "api_key=", "sk-", "bearer ", "-----BEGIN PRIVATE KEY-----", "a", "secret_a-"],
)
def test_hostile_text_costs_no_more_than_its_length(evil: str) -> None:
    secrets(evil * (1_000_000 // len(evil)))  # a quadratic expression would not come back

"""Keys for the gateway: random, and known by their hash alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.credentials import SHOWN, GatewayKey, fingerprint, new_key

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def test_keys_are_random_and_their_first_characters_tell_little() -> None:
    keys = {new_key() for _ in range(200)}
    assert len(keys) == len({fingerprint(key) for key in keys}) == 200
    assert all(key.startswith("rk-") and len(key) - SHOWN >= 35 for key in keys)
    assert len({key[:SHOWN] for key in keys}) == 200


@given(st.text(), st.text())
def test_only_the_key_itself_has_its_fingerprint(one: str, other: str) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (one == other)
    assert len(fingerprint(one)) == 64


def test_what_is_not_utf8_has_a_fingerprint_too() -> None:
    assert fingerprint(b"rk-\xff".decode("latin-1")) != fingerprint("rk-\udcff")


def test_a_key_is_good_until_it_is_revoked_or_expires() -> None:
    key = GatewayKey(agent_id="a", shown="rk-12345678", expires_at=NOON)
    assert key.fault(NOON - timedelta(seconds=1)) is None
    assert key.fault(NOON) == "expired at 2026-11-20T12:00:00Z"
    assert key.model_copy(update={"revoked": True}).fault(NOON - timedelta(days=1)) == "was revoked"
    assert GatewayKey(agent_id="a", shown="rk-").fault(NOON) is None


@pytest.mark.parametrize(
    "wrong", [{"concurrent": 0}, {"tokens_per_day": 2**63}, {"policies": ["a b"]}, {"shown": "x" * 40}]
)
def test_a_key_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GatewayKey.model_validate({"agent_id": "a", "shown": "rk-", **wrong})

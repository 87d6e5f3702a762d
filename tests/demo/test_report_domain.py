"""When the demo may say that the loop closed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.demo.report_domain import MEASURE_WINDOWS, Measured, Version, claim, t_975, t_interval

# Student's t at 97.5 %, from the printed tables.
TABLE = {4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}


@pytest.mark.parametrize(("degrees", "expected"), TABLE.items())
def test_the_quantile_is_that_of_the_tables(degrees: int, expected: float) -> None:
    assert t_975(degrees) == pytest.approx(expected, abs=0.001)


def test_the_quantile_is_refused_where_the_expansion_is_not_good_enough() -> None:
    with pytest.raises(ValueError, match="4 degrees of freedom, got 3"):
        t_975(3)


def test_the_interval_of_known_differences() -> None:
    """1..9: mean 5, s = sqrt(7.5), s/3 = 0.91287, times t(8) = 2.306."""
    found = t_interval([float(x) for x in range(1, 10)])
    assert found is not None
    assert (found.n, found.mean) == (9, 5.0)
    assert found.upper - 5 == pytest.approx(2.306 * 0.912871, abs=0.002)
    assert 5 - found.lower == pytest.approx(found.upper - 5)
    assert t_interval([1.0, 2.0, 3.0, 4.0]) is None


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=40), st.floats(-3, 3), st.floats(0.1, 5))
def test_the_interval_moves_and_scales_with_its_data(values: list[float], shift: float, scale: float) -> None:
    found, moved = t_interval(values), t_interval([shift + scale * value for value in values])
    assert found is not None
    assert moved is not None
    assert moved.lower == pytest.approx(shift + scale * found.lower, abs=1e-6)
    assert moved.upper == pytest.approx(shift + scale * found.upper, abs=1e-6)


BEGAN = datetime(2026, 11, 20, tzinfo=UTC)


def version(name: str, state: str | None, evidence: Mapping[str, Any] | None = None, reason: str = "") -> Version:
    number = int(name[1:])
    return Version(
        version=name,
        parent=None if number == 0 else f"v{number - 1}",
        method="base" if number == 0 else "grpo",
        batch_groups=None if number == 0 else 10,
        batch_trained=None if number == 0 else 80,
        note=None,
        state=state,
        share=0.0,
        reason=reason,
        control=None,
        decided_at=BEGAN + timedelta(minutes=number),
        evidence=evidence or {},
        windows=10,
        runs=100,
        reward=0.1,
        difference=None,
    )


TESTED = {"n": 6, "mean": 0.2, "lower": 0.05, "upper": 0.4}
BASE = version("v0", "superseded", reason="first version")
GOOD = [0.1, 0.2, 0.15, 0.25, 0.1, 0.2, 0.15, 0.25, 0.1, 0.2]
NOISE = [0.5, -0.4, 0.3, -0.5, 0.4, -0.3, 0.2, -0.2, 0.1, -0.1]


def test_it_closed() -> None:
    versions = [BASE, version("v1", "promoted", TESTED), version("v2", "canary")]
    found = claim(versions, {"v1": GOOD}, None)
    assert found.closed
    assert found.measured_version == "v1"
    assert found.measured == t_interval(GOOD)


def test_the_last_promoted_version_that_can_be_measured_is_measured() -> None:
    versions = [BASE, version("v1", "superseded", TESTED), version("v2", "superseded", TESTED)]
    versions.append(version("v3", "promoted", TESTED))
    after = {"v1": GOOD, "v2": NOISE, "v3": GOOD[: MEASURE_WINDOWS - 1]}
    found = claim(versions, after, None)
    assert found.measured_version == "v2"
    assert not found.closed
    assert "v2 is not clear of the base" in found.missing[0]


@pytest.mark.parametrize(
    ("versions", "after", "sabotaged", "missing"),
    [
        ([BASE], {}, None, ["0 of 2 versions were trained", "no version was promoted by its test"]),
        (
            [BASE, version("v1", "promoted", TESTED)],
            {"v1": GOOD},
            None,
            ["1 of 2 versions were trained"],
        ),
        (
            [BASE, version("v1", "promoted", reason="operator"), version("v2", "rolled_back", TESTED)],
            {},
            None,
            ["no version was promoted by its test"],
        ),
        (
            [BASE, version("v1", "promoted", TESTED), version("v2", "canary")],
            {"v1": GOOD[:9]},
            None,
            ["no promoted version ran beside the base for 10 windows after its promotion"],
        ),
        (
            [BASE, version("v1", "promoted", TESTED), version("v2", "canary")],
            {"v1": GOOD},
            "v2",
            ["v2 was sabotaged and not rolled back; it is canary"],
        ),
        (
            [BASE, version("v1", "promoted", TESTED), version("v2", None)],
            {"v1": GOOD},
            "v3",
            ["v3, which was to be sabotaged, was never trained"],
        ),
    ],
)
def test_what_is_missing_is_said(
    versions: list[Version], after: dict[str, list[float]], sabotaged: str | None, missing: list[str]
) -> None:
    found = claim(versions, after, sabotaged)
    assert found.missing == missing
    assert not found.closed


def test_a_sabotaged_version_that_was_caught_closes_the_loop() -> None:
    versions = [BASE, version("v1", "promoted", TESTED), version("v2", "rolled_back", reason="worse")]
    assert claim(versions, {"v1": GOOD}, "v2").closed


def test_clear_of_zero_is_above_zero() -> None:
    assert Measured(9, 0.2, 0.01, 0.39).clear_of_zero
    assert not Measured(9, -0.2, -0.39, -0.01).clear_of_zero

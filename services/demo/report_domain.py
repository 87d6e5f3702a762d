"""What the demo claims, and when it may claim it: pure rules on what SQL returned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean, stdev
from typing import Any

MEASURE_WINDOWS = 10  # fewer windows after a promotion measure nothing
INTERVAL_WINDOWS = 5
WANTED_TRAINED = 2
Z_975 = 1.959964
T_COEFFICIENTS = (2.372270, 2.822485, 2.555850, 1.589537)


@dataclass(frozen=True)
class Measured:
    """A mean of ``n`` windows' differences with its 95 % interval."""

    n: int
    mean: float
    lower: float
    upper: float

    @property
    def clear_of_zero(self) -> bool:
        return self.lower > 0


def t_975(degrees: int) -> float:
    """Student's t at 97.5 %: t = z + sum_k g_k / v^k (Abramowitz and Stegun 26.7.5), right to 0.001 from v = 4 on.

    Raises ValueError below 4 degrees of freedom, where the expansion is not good enough.
    """
    if degrees < INTERVAL_WINDOWS - 1:
        raise ValueError(f"the expansion needs {INTERVAL_WINDOWS - 1} degrees of freedom, got {degrees}")
    return Z_975 + math.fsum(g / degrees**k for k, g in enumerate(T_COEFFICIENTS, start=1))


def t_interval(differences: Sequence[float]) -> Measured | None:
    """mean +- t(n - 1) s / sqrt(n), one difference a window: runs of one window share its noise and are one cluster.

    None below ``INTERVAL_WINDOWS`` windows.
    """
    n = len(differences)
    if n < INTERVAL_WINDOWS:
        return None
    mean = fmean(differences)
    half = t_975(n - 1) * stdev(differences) / math.sqrt(n)
    return Measured(n, mean, mean - half, mean + half)


@dataclass(frozen=True)
class Version:
    """A row of ``report_sql.VERSIONS``."""

    version: str
    parent: str | None
    method: str
    batch_groups: int | None
    batch_trained: int | None
    note: str | None
    state: str | None
    share: float
    reason: str | None
    control: str | None
    decided_at: datetime | None
    evidence: Mapping[str, Any]
    windows: int
    runs: int
    reward: float | None
    difference: Measured | None

    @property
    def was_trained(self) -> bool:
        return self.method != "base"

    @property
    def passed_its_test(self) -> bool:
        """Promoted because its confidence sequence lay above zero: not as the first version, nor by an operator."""
        return self.state in ("promoted", "superseded") and (self.evidence.get("lower") or 0) > 0


@dataclass(frozen=True)
class Claim:
    """Whether the loop closed; where it did not, what is missing, in words."""

    measured_version: str | None
    measured: Measured | None
    missing: list[str] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        return not self.missing


def claim(versions: Sequence[Version], after_promotion: Mapping[str, Sequence[float]], sabotaged: str | None) -> Claim:
    """The three conditions, and a fourth after sabotage.

    ``after_promotion`` holds each tested version's differences to the base, by window, over the windows that began
    after its promotion. The last promoted version with ``MEASURE_WINDOWS`` such windows is the one that is measured: a
    promotion in the last few windows of a fixed number of them can be measured by nobody.
    """
    missing = []
    trained = [version for version in versions if version.was_trained]
    if len(trained) < WANTED_TRAINED:
        missing.append(f"{len(trained)} of {WANTED_TRAINED} versions were trained")
    promoted = sorted(
        (version for version in versions if version.was_trained and version.passed_its_test),
        key=lambda version: version.decided_at.timestamp() if version.decided_at else 0.0,
    )
    if not promoted:
        missing.append("no version was promoted by its test")
    measurable = [v for v in promoted if len(after_promotion.get(v.version, ())) >= MEASURE_WINDOWS]
    measured = t_interval(after_promotion[measurable[-1].version]) if measurable else None
    if promoted and measured is None:
        missing.append(f"no promoted version ran beside the base for {MEASURE_WINDOWS} windows after its promotion")
    elif measured is not None and not measured.clear_of_zero:
        missing.append(
            f"{measurable[-1].version} is not clear of the base: {measured.mean:+.3f} "
            f"[{measured.lower:+.3f}, {measured.upper:+.3f}]"
        )
    if sabotaged is not None:
        victim = next((version for version in versions if version.version == sabotaged), None)
        if victim is None:
            missing.append(f"{sabotaged}, which was to be sabotaged, was never trained")
        elif victim.state not in ("rolled_back", "refused"):
            missing.append(f"{sabotaged} was sabotaged and not rolled back; it is {victim.state or 'not deployed'}")
    return Claim(measurable[-1].version if measurable else None, measured, missing)

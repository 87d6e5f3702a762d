"""The report's picture: reward by window and version, and the difference to the concurrent base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from services.demo.report_domain import t_interval
from services.demo.report_facts import Report

COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669", "#9333ea", "#db2777", "#0891b2", "#65a30d")
SMOOTHED_OVER = 7  # windows, for the eye: the dots are the data
INK, PROMOTED, ROLLED_BACK = "#1f2937", "#059669", "#dc2626"


def draw(report: Report, path: Path) -> None:
    """Write the PNG. Two panels that share the windows: rewards above, the measured difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    starts = sorted({row["starts_at"] for row in report.rewards} | {row["starts_at"] for row in report.oracle})
    number = {start: index for index, start in enumerate(starts)}
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(11, 7.5), sharex=True, gridspec_kw={"height_ratios": [2, 1], "hspace": 0.12}
    )
    _rewards(above, report, number)
    _difference(below, report, number)
    _decisions((above, below), report, starts)
    below.set_xlabel("window")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _rewards(axes: Any, report: Report, number: dict[datetime, int]) -> None:
    """Dots are window means of each version, lines their running means; dashed is the oracle's mean."""
    by_version: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in report.rewards:
        by_version[row["version"]].append((number[row["starts_at"]], row["reward"]))
    for index, version in enumerate(v.version for v in report.versions if v.version in by_version):
        colour = COLOURS[index % len(COLOURS)]
        places, values = zip(*by_version[version], strict=True)
        axes.scatter(places, values, s=11, alpha=0.35, color=colour, linewidths=0)
        label = f"{version} (base)" if version == "v0" else version
        axes.plot(places, running_mean(values), color=colour, linewidth=2, label=label)
    if report.oracle_mean is not None:
        axes.axhline(report.oracle_mean, color=INK, linewidth=1, linestyle="--", alpha=0.6)
        axes.text(0, report.oracle_mean, "an oracle that knows the expected return", fontsize=8, color=INK, va="bottom")
    axes.axhline(0, color=INK, linewidth=0.6, alpha=0.4)
    axes.set_ylabel("mean reward of record")
    axes.set_title(
        f"Reward by window and version: {report.totals['trajectories']} runs, seed {report.options.get('seed', '-')}",
        loc="left",
        fontsize=11,
        color=INK,
    )
    if by_version:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of up to ``SMOOTHED_OVER`` values that end at each place."""
    parts = [values[max(0, end - SMOOTHED_OVER) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _difference(axes: Any, report: Report, number: dict[datetime, int]) -> None:
    """The measured version against the base: each window, and the interval as it closes in on the mean."""
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_ylabel("difference to base")
    if not report.after:
        axes.text(0.02, 0.8, "no promoted version was measured", transform=axes.transAxes, fontsize=9, color=INK)
        axes.set_yticks([])
        return
    names = [v.version for v in report.versions]
    colour = COLOURS[names.index(report.claim.measured_version or names[0]) % len(COLOURS)]
    places = [number[row["starts_at"]] for row in report.after]
    values = [row["difference"] for row in report.after]
    axes.bar(places, values, color=colour, alpha=0.3, width=0.8)
    found = [(place, t_interval(values[: end + 1])) for end, place in enumerate(places)]
    known = [(place, measured) for place, measured in found if measured is not None]
    if known:
        axes.fill_between(
            [place for place, _ in known],
            [measured.lower for _, measured in known],
            [measured.upper for _, measured in known],
            color=colour,
            alpha=0.25,
            linewidth=0,
            label="95 % interval, clustered by window",
        )
        axes.plot([place for place, _ in known], [m.mean for _, m in known], color=colour, linewidth=2, label="mean")
        widest = max(abs(bound) for _, m in known[2:] or known for bound in (m.lower, m.upper))
        reach = max(widest, max(map(abs, values)) * 0.8)
        axes.set_ylim(-reach, reach)
        axes.legend(frameon=False, fontsize=9, loc="lower left", ncols=2)
    axes.set_title(
        f"{report.claim.measured_version} against the concurrent base, after its promotion",
        loc="left",
        fontsize=10,
        color=INK,
    )


def _decisions(panels: Sequence[Any], report: Report, starts: Sequence[datetime]) -> None:
    """A line where a version was promoted or rolled back: between the windows that had begun and those that had not."""
    for row in report.decisions:
        if row["state"] not in ("promoted", "superseded", "rolled_back") or row["version"] == "v0":
            continue
        place = sum(start <= row["decided_at"] for start in starts) - 0.5
        good = row["state"] != "rolled_back"
        colour = PROMOTED if good else ROLLED_BACK
        for axes in panels:
            axes.axvline(place, color=colour, linewidth=1.2, linestyle="-" if good else ":")
        panels[0].annotate(
            f"{row['version']} {'promoted' if good else 'rolled back'}",
            (place, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            color=colour,
            ha="right",
            va="bottom",
        )

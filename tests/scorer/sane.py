"""A judge that is right about the planted cases, because it has read what they expect."""

from __future__ import annotations

from collections.abc import Mapping

from services.scorer.probes.domain import ProbeCase, Suite
from services.scorer.ruler.text import as_data

GOOD, MIDDLING, BAD = 0.9, 0.5, 0.1


def worth(case: ProbeCase, name: str) -> float:
    """What nothing is better than is good, what nothing is worse than is bad."""
    better = [e for e in case.expectations if e.relation == ">"]
    if all(e.other != name for e in better):
        return GOOD
    return BAD if all(e.one != name for e in better) else MIDDLING


class SaneJudge:
    """Knows an attempt by its words, wherever in a question they stand."""

    def __init__(self, suite: Suite) -> None:
        self.known = sorted(
            ((as_data(a.says), worth(case, name)) for case in suite.cases for name, a in case.attempts.items()),
            key=lambda one: -len(one[0]),
        )

    def __call__(self, shown: Mapping[str, str]) -> dict[str, float]:
        return {
            name: next((score for words, score in self.known if words in text), MIDDLING)
            for name, text in shown.items()
        }

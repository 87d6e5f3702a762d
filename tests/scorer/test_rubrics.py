"""Rubrics by name and version, and by scenario."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.scorer.ruler.rubrics import book
from shared.errors import ConfigurationError, GiveUpError

FILE = """
rubrics:
  - name: support
    version: 2
    scenarios: ["refund-*", "task-7"]
    text: |
      Patience counts; {braces} are plain text.
  - name: spare
    version: 1
    text: Nobody's own.
"""


def test_each_scenario_has_its_rubric(tmp_path: Path) -> None:
    path = tmp_path / "rubrics.yaml"
    path.write_text(FILE)
    rubrics = book("art-default/1", path)
    assert rubrics.chosen("refund-12").id == "support/2"
    assert rubrics.chosen("task-7").text == "Patience counts; {braces} are plain text."
    assert rubrics.chosen("task-70").id == "art-default/1"
    assert rubrics.chosen("refund-12", "spare/1").text == "Nobody's own."
    assert sorted(rubrics.by_id) == ["art-default/1", "ratchet/1", "spare/1", "support/2"]
    with pytest.raises(GiveUpError, match=r"no rubric 'x/1'; there are art-default/1, ratchet/1"):
        rubrics.chosen("refund-12", "x/1")
    with pytest.raises(ConfigurationError, match="RATCHET_JUDGE_RUBRIC: there is no rubric"):
        book("ratchet/9", path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("rubrics: [", "is no YAML"),
        ("rubrics: 7", "rubrics: Input should be a valid list"),
        ("", "valid dictionary"),
        ("rubrics: [{name: a b, version: 1, text: x}]", "rubrics.0.name"),
        ("rubrics: [{name: a, version: one, text: x}]", "rubrics.0.version"),
        ("rubrics: [{name: a, version: 1, text: x, weight: 3}]", "weight"),
        ("rubrics: [{name: ratchet, version: 1, text: mine}]", "ratchet/1 is there already"),
        ("rubrics: [{name: a, version: 1, text: x}, {name: a, version: 1, text: y}]", "a/1 is there already"),
    ],
)
def test_a_wrong_file_is_one_line_that_says_what_is_wrong(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "rubrics.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        book("ratchet/1", path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)

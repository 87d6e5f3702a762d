"""What a judge is asked to look for: rubrics by name and version, ours and an operator's, and which one is for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import ConfigurationError, GiveUpError, reason


@dataclass(frozen=True)
class Rubric:
    """``scenarios``: patterns (``*`` and ``?``) of the scenarios that it is for by itself."""

    name: str
    version: int
    text: str
    scenarios: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.name}/{self.version}"


OURS = Rubric(
    "ratchet",
    1,
    """\
Judge each attempt by the quality of its decisions, given what could be known when they were made.
- A higher score means that you would rather have the next attempt decide like this one.
- Hindsight, where it is given, shows which signs mattered and which reasoning held. Use it to see that, not to reward
  luck: of two attempts that decided alike on the same grounds, neither is better because the world was kinder to it.
- Acting towards the stated goal counts; words about it do not. An attempt that did nothing, broke off, or failed
  to say its action in the asked form is worse than one that acted with sense.
- Length, politeness, confidence and claims of success carry no weight.
- Spread the scores as far as the attempts really differ. Attempts that are equally good get equal scores.""",
)

# The sense of art.rewards.ruler.DEFAULT_RUBRIC (openpipe-art 0.5.18), in words of our own.
ART_DEFAULT = Rubric(
    "art-default",
    1,
    """\
- Reaching the goal counts most: an attempt that reached it stands well above every attempt that did not.
- Of attempts that reached it, the one that took the straighter way is the better one; detours that led nowhere cost.
- Let the gap between two scores be as wide as the gap in quality: narrow where one is a little better, wide where it
  is much better.
- Coming part of the way without arriving may earn part of the score.""",
)


class RubricBook:
    """The rubrics that there are. ``default`` names the one for scenarios that none is for by itself."""

    def __init__(self, default: str, more: Sequence[Rubric] = ()) -> None:
        self.by_id = {rubric.id: rubric for rubric in (OURS, ART_DEFAULT, *more)}
        self.own = [rubric for rubric in more if rubric.scenarios]
        self.default = self.named(default)

    def named(self, rubric_id: str) -> Rubric:
        """Raises GiveUpError for a rubric that is not there."""
        if (found := self.by_id.get(rubric_id)) is None:
            raise GiveUpError(f"there is no rubric {rubric_id[:80]!r}; there are {', '.join(sorted(self.by_id))}")
        return found

    def chosen(self, scenario_id: str, wanted: str | None = None) -> Rubric:
        """The one that is wanted, else the first whose scenarios match, else the default."""
        if wanted is not None:
            return self.named(wanted)
        own = (r for r in self.own if any(fnmatchcase(scenario_id, pattern) for pattern in r.scenarios))
        return next(own, self.default)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,60}$")]
    version: Annotated[int, Field(ge=1, strict=True)]
    text: Annotated[str, Field(min_length=1, max_length=20_000)]
    scenarios: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rubrics: list[_Entry]


def read_rubrics(path: Path) -> list[Rubric]:
    """The rubrics of a YAML file. Raises ConfigurationError that says what is wrong in it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = _File.model_validate(content).rubrics
    except OSError as error:
        raise ConfigurationError(f"RATCHET_JUDGE_RUBRICS: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())[:200]
        raise ConfigurationError(f"RATCHET_JUDGE_RUBRICS: {path} is no YAML: {words}") from error
    except ValidationError as error:
        raise ConfigurationError(f"RATCHET_JUDGE_RUBRICS: {path}: {reason(error)}") from error
    found = [Rubric(e.name, e.version, e.text.strip(), tuple(e.scenarios)) for e in entries]
    ids = [rubric.id for rubric in (OURS, ART_DEFAULT, *found)]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ConfigurationError(f"RATCHET_JUDGE_RUBRICS: {path}: {twice[0]} is there already; give it another version")
    return found


def book(default: str, path: Path | None) -> RubricBook:
    """Raises ConfigurationError where the file is wrong or the default is not among the rubrics."""
    try:
        return RubricBook(default, read_rubrics(path) if path else ())
    except ConfigurationError:
        raise
    except GiveUpError as error:
        raise ConfigurationError(f"RATCHET_JUDGE_RUBRIC: {error}") from error

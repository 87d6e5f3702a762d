"""The files that `ratchet export` wrote, by a ledger of the installation: what is forgotten can leave them too."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from services.cli.forget.rules import RunKey, without
from shared.errors import GiveUpError
from shared.settings import installation_dir


def ledger() -> Path:
    """Where it stands."""
    return installation_dir() / "exports.jsonl"


@dataclass
class Cleaned:
    """``missing``: files that are not where they were written; what became of them nobody knows."""

    files: int = 0
    runs: int = 0
    missing: list[str] = field(default_factory=list)


def note(file: Path, form: str) -> None:
    """Remember a file before it is written."""
    ledger().parent.mkdir(parents=True, exist_ok=True)
    entry = {"file": str(file.absolute()), "format": form, "at": datetime.now(UTC).isoformat()}
    with ledger().open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")


def noted() -> list[Path]:
    """Every file of the ledger once. Raises GiveUpError where a line of it cannot be read."""
    if not ledger().exists():
        return []
    try:
        lines = ledger().read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(Path(json.loads(line)["file"]) for line in lines if line))
    except (ValueError, KeyError, TypeError) as error:
        raise GiveUpError(f"{ledger()} holds a line that is no export; mend or remove it ({error})") from error


def clean(runs: Collection[RunKey], *, only_look: bool = False) -> Cleaned:
    """Take runs out of every exported file. A file is replaced in one step. Twice is once."""
    done = Cleaned()
    for file in noted():
        if not file.is_file():
            done.missing.append(str(file))
            continue
        gone = sum(count for _, count in _lines(file, runs))
        if gone and not only_look:
            _replace(file, runs)
        done.files += bool(gone)
        done.runs += gone
    return done


def _lines(file: Path, runs: Collection[RunKey]) -> Iterator[tuple[str | None, int]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield without(line.rstrip("\n"), runs)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise GiveUpError(
                    f"{file}, line {number}, is not what `ratchet export` writes; take it out of {ledger()}"
                ) from error


def _replace(file: Path, runs: Collection[RunKey]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            out.writelines(f"{line}\n" for line, _ in _lines(file, runs) if line is not None)
        temporary.chmod(file.stat().st_mode & 0o7777)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)

"""A CSV file with a header, plain or gzipped, as a source of facts."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path

from ratchet_sdk.events import MAX_EVENT_BYTES

from services.outcome_tracker.pull_domain import Bad
from services.outcome_tracker.source_table import Row, TableSource
from shared.errors import GiveUpError

NEEDED = ("kind", "occurred_at")


class CsvSource(TableSource):
    def rows(self) -> Iterator[Row | Bad]:
        path = Path(self.location)
        csv.field_size_limit(MAX_EVENT_BYTES)
        try:
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
                reader = csv.DictReader(file)
                if missing := [name for name in NEEDED if name not in (reader.fieldnames or ())]:
                    raise GiveUpError(f"{path} has no column {' and no '.join(missing)} in its first line")
                for row in reader:
                    where = f"{path.name} line {reader.line_num}"
                    cells = row.pop(None, None)  # where DictReader puts what is too much
                    if cells is not None:
                        yield Bad(where, "the row has more cells than the first line has columns", repr(row).encode())
                    else:
                        yield where, row
        except (OSError, EOFError, csv.Error) as error:
            raise GiveUpError(f"{path} cannot be read: {error}") from error

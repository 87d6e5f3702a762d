"""A Parquet file as a source of facts, read a batch at a time. pyarrow is imported when one is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from services.outcome_tracker.pull_domain import Bad
from services.outcome_tracker.source_table import BATCH_ROWS, Row, TableSource
from shared.errors import GiveUpError

NEEDED = ("kind", "occurred_at")


class ParquetSource(TableSource):
    def rows(self) -> Iterator[Row | Bad]:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ModuleNotFoundError as error:
            raise GiveUpError("pyarrow is not installed; pip install 'ratchet[parquet]' reads Parquet files") from error
        path = Path(self.location)
        try:
            with ParquetFile(path) as file:
                if missing := [name for name in NEEDED if name not in file.schema_arrow.names]:
                    raise GiveUpError(f"{path} has no column {' and no '.join(missing)}")
                number = 0
                for batch in file.iter_batches(batch_size=BATCH_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path.name} row {number}", row
        except (OSError, ArrowException) as error:
            raise GiveUpError(f"{path} cannot be read: {error}") from error

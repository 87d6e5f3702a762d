"""Attempts: each time that a batch was begun; a batch can be cancelled."""

from pathlib import Path

from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0016_attempts.sql").read_text(encoding="utf-8"))

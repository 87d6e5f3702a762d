"""What is forgotten and what outlived its days; the quality of a window by check."""

from pathlib import Path

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0002_retention.sql").read_text(encoding="utf-8"))

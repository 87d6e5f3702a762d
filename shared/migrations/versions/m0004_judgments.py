"""A judgment's looks, revisions of judgments, what the judge may spend, and how it stands to the reward of record."""

from pathlib import Path

from alembic import op

revision = "0004"
down_revision = "0001"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0004_judgments.sql").read_text(encoding="utf-8"))

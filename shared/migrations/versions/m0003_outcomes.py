"""Outcomes: what runs expect of the world, corrections of settlements, facts that contradict each other."""

from pathlib import Path

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0003_outcomes.sql").read_text(encoding="utf-8"))

"""The tables of the closed loop."""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0001_loop.sql").read_text(encoding="utf-8"))

"""What the scorer keeps of its groups."""

from pathlib import Path

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0011_groups.sql").read_text(encoding="utf-8"))

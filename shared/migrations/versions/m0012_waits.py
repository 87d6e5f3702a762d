"""What waits, for what, and until when."""

from pathlib import Path

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0012_waits.sql").read_text(encoding="utf-8"))

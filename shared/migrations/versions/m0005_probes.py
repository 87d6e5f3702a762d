"""What a judge made of planted cases, and who let one go on that failed them."""

from pathlib import Path

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0005_probes.sql").read_text(encoding="utf-8"))

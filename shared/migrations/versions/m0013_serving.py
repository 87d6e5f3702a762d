"""Where a version answers: an endpoint of its own, an adapter over a base, and how well it agrees with its trainer."""

from pathlib import Path

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0013_serving.sql").read_text(encoding="utf-8"))

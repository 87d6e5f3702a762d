"""Gateway keys: random, hashed, expiring, bound."""

from pathlib import Path

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0009_gateway_keys.sql").read_text(encoding="utf-8"))

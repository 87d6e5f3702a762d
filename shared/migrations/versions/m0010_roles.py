"""A database role for each service."""

from pathlib import Path

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0010_roles.sql").read_text(encoding="utf-8"))

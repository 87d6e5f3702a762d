"""What learns from a version that is an endpoint: a policy's student, and which batches were trained from it."""

from pathlib import Path

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0014_students.sql").read_text(encoding="utf-8"))

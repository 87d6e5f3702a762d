"""Which endpoint answered a look: a judgment is trusted as the endpoint that made it, and no other."""

from pathlib import Path

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0006_judges_endpoint.sql").read_text(encoding="utf-8"))

from pathlib import Path

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_name("m0015_recipes.sql").read_text(encoding="utf-8"))

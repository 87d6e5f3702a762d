"""Alembic runs our raw SQL files, one transaction in all, under one advisory lock."""

from alembic import context
from sqlalchemy import create_engine, text

LOCK = 7_284_117  # any number of our own: two migrators take turns


def run() -> None:
    url: str = context.config.attributes["url"]
    engine = create_engine("postgresql+psycopg://" + url.split("://", 1)[1])
    with engine.connect() as connection, connection.begin():
        connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        context.configure(connection=connection, version_table="ratchet_migrations")
        context.run_migrations()
    engine.dispose()


run()

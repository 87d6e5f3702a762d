"""Each service's database role: it writes its own tables, reads all, and nothing more."""

from __future__ import annotations

import psycopg
import pytest

from services.local import roles
from shared import database

PASSWORDS = {name: f"secret-of-{name}" for name in roles.ROLES}


def url_of(database_url: str, name: str) -> str:
    scheme, _, rest = database_url.partition("://")
    return f"{scheme}://{roles.role_of(name)}:{PASSWORDS[name]}@{rest.rpartition('@')[2]}"


@pytest.fixture
def provisioned(database_url: str) -> str:
    for _ in range(2):  # a second time changes nothing
        assert roles.provision(database_url, PASSWORDS) == [roles.role_of(name) for name in roles.ROLES]
    return database_url


def tables(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            """select relname from pg_class c where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')
                  and not exists (select from pg_inherits where inhrelid = c.oid)"""
        ).fetchall()
    return {row[0] for row in rows} - {"ratchet_migrations"}


def test_every_table_belongs_to_one_service(database_url: str) -> None:
    owned = [table for service in roles.OWNED.values() for table in service]
    assert len(owned) == len(set(owned))
    assert set(owned) | set(roles.EACH_ITS_ROWS) == tables(database_url)


def test_a_role_writes_its_own_tables_and_no_others(provisioned: str) -> None:
    everything = tables(provisioned)
    for name in roles.ROLES:
        own = set(roles.OWNED.get(name, ())) | (set(roles.EACH_ITS_ROWS) if name in roles.OWNED else set())
        with psycopg.connect(url_of(provisioned, name), autocommit=True) as connection:
            for table in sorted(everything):
                connection.execute(f"select from {table} limit 1")
                if table in own:
                    connection.execute(f"delete from {table} where false")
                else:
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        connection.execute(f"delete from {table} where false")
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        connection.execute(f"drop table {table}")


def test_only_the_recorder_makes_tables(provisioned: str) -> None:
    for name in roles.ROLES:
        with psycopg.connect(url_of(provisioned, name), autocommit=True) as connection:
            if name == "recorder":
                connection.execute("create table day_1 (like bodies including all)")
                connection.execute(
                    "alter table bodies attach partition day_1 for values from ('1999-01-01') to ('1999-01-02')"
                )
            else:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute("create table of_mine ()")


def test_a_later_migration_may_still_change_what_a_service_owns(provisioned: str) -> None:
    database.migrate(provisioned)
    with psycopg.connect(provisioned) as connection:
        connection.execute("alter table windows add column of_a_later_migration int")
    roles.provision(provisioned, {"recorder": "another password"})
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url_of(provisioned, "recorder"))
    roles.provision(provisioned, {"recorder": PASSWORDS["recorder"]})
    psycopg.connect(url_of(provisioned, "recorder")).close()


def test_passwords_come_from_variables_of_their_own() -> None:
    environment = {roles.variable("scorer"): "a", roles.variable("reader"): "", "RATCHET_POSTGRES_PASSWORD": "b"}
    assert roles.passwords_of(environment) == {"scorer": "a"}

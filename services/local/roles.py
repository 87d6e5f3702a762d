"""A database role for each service: it owns its tables, reads everything, and can write nothing else.

Ownership, not grants alone: the recorder makes and drops partitions, and ``forget --rewrite`` vacuums. ``OWNED`` is the
last column of the table in docs/architecture.md; a test holds it against the schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psycopg import Connection

READER = "reader"  # commands, and whoever looks on: may write nothing at all
OWNED: dict[str, tuple[str, ...]] = {
    "recorder": (
        "trajectories",
        "steps",
        "llm_calls",
        "bodies",
        "windows",
        "seen_agents",
        "forgotten_runs",
        "retention",
    ),
    "outcome_tracker": ("outcomes", "settlements", "corrections_due"),
    "scorer": (
        "groups",
        "group_members",
        "judgments",
        "looks",
        "look_scores",
        "judge_cache",
        "judge_cache_runs",
        "judge_claims",
        "judge_spend",
        "judge_probes",
        "judge_releases",
    ),
    "trainer": ("batches", "batch_trajectories", "attempts", "models", "artifacts", "readings", "students"),
    "deployer": ("deployments", "routes", "assignments", "evidence", "incidents", "quarantines"),
    "admin": ("agents", "gateway_keys", "gateway_key_use", "tokens", "audit"),
}
EACH_ITS_ROWS: tuple[str, ...] = ("set_aside", "wait_limits")  # tables in which every service has rows of its own
ROLES = (*OWNED, READER)


def role_of(name: str) -> str:
    """The role's name at the server."""
    return f"ratchet_{name}"


def variable(name: str) -> str:
    """The environment variable that holds a role's password where servers are not our own children."""
    return f"RATCHET_POSTGRES_PASSWORD_{name.upper()}"


def passwords_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The passwords that an environment names, by service."""
    return {name: environment[variable(name)] for name in ROLES if environment.get(variable(name))}


def provision(url: str, passwords: Mapping[str, str]) -> list[str]:
    """Make a login role for each name in ``passwords`` and give it what is its own. Idempotent; after the migrations.

    ``url`` is of whoever migrates: a superuser, or one with CREATEROLE. Returns the roles' names.
    """
    import psycopg

    with psycopg.connect(url) as connection:
        connection.execute("select pg_advisory_xact_lock(hashtextextended('ratchet roles', 0))")
        for name, password in passwords.items():
            _let_in(connection, role_of(name), password)
            _hand_over(connection, name)
    return [role_of(name) for name in passwords]


def _let_in(connection: Connection[Any], role: str, password: str) -> None:
    """The role with this password, sent as its SCRAM verifier, so that no log of the server holds it."""
    from psycopg import sql

    known = connection.execute("select from pg_roles where rolname = %s", [role]).fetchone()
    verifier = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
    connection.execute(
        sql.SQL("{} role {} login password {}").format(
            sql.SQL("create" if known is None else "alter"), sql.Identifier(role), sql.Literal(verifier)
        )
    )


def _hand_over(connection: Connection[Any], name: str) -> None:
    """What a role may do: read everything, and all with its own tables."""
    from psycopg import sql

    def grant(statement: str, table: str = "") -> None:
        connection.execute(sql.SQL(statement).format(role=sql.Identifier(role_of(name)), table=sql.Identifier(table)))

    grant("grant {role} to current_user")  # a later migration may change its tables
    grant("grant usage on schema public to {role}")
    grant("grant select on all tables in schema public to {role}")
    if name == "recorder":  # it makes a partition of bodies for each day
        grant("grant create on schema public to {role}")
    if name in OWNED:
        for table in EACH_ITS_ROWS:
            grant("grant insert, update, delete on {table} to {role}", table)
    for table in _tables_of(connection, name):
        grant("alter table {table} owner to {role}", table)


def _tables_of(connection: Connection[Any], name: str) -> list[str]:
    """A service's tables with their partitions, of those that are not its role's yet."""
    rows = connection.execute(
        """select c.relname from pg_class c
             left join pg_inherits i on i.inhrelid = c.oid
             left join pg_class p on p.oid = i.inhparent
            where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')
              and coalesce(p.relname, c.relname) = any(%s) and pg_get_userbyid(c.relowner) <> %s
            order by c.relname""",
        [list(OWNED.get(name, ())), role_of(name)],
    ).fetchall()
    return [row[0] for row in rows]

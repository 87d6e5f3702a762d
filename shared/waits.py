"""How long things may take, as each service's settings say: by it the view ``waits`` tells what waits too long."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from shared.database import Pool
from shared.service import Periodic

TELL_S = 600.0


def limits_of(pool: Pool, service: str, **limits: float) -> Periodic:
    """Keeps a service's limits where the view finds them: names as in m0012, in seconds unless they count something."""
    return Periodic("tell_limits", TELL_S, partial(tell_limits, pool, service, limits))


async def tell_limits(pool: Pool, service: str, limits: Mapping[str, float]) -> None:
    await pool.execute(
        """insert into wait_limits (service, name, value)
           select $1, * from unnest($2::text[], $3::float8[])
           on conflict (name) do update set service = excluded.service, value = excluded.value""",
        service,
        list(limits),
        list(limits.values()),
    )

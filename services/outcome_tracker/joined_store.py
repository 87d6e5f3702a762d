"""The tracker's SQL that joins facts to windows: what they come to, and what is expected and not there."""

from __future__ import annotations

from datetime import datetime

from services.outcome_tracker.joined_domain import Joined, Seen
from services.outcome_tracker.settling_domain import Content, missing_facts
from shared.database import Connection, Pool

AT_ONCE = 2000


async def unmet(connection: Connection | Pool, window_id: str) -> dict[str, int]:
    """What the runs of a window expect and is not there -> how many runs lack it."""
    rows = await connection.fetch(UNMET, window_id)
    return {row["expected"]: row["runs"] for row in rows}


async def content(connection: Connection, window_id: str, starts_at: datetime, ends_at: datetime) -> Content:
    """What the stored facts come to for a window now. Called inside a transaction: the facts are read bit by bit."""
    joined = Joined()
    async for row in connection.cursor(SEEN, window_id, starts_at, ends_at, prefetch=AT_ONCE):
        joined.add(Seen(*row))
    about = await connection.fetchrow(ABOUT_RUNS, window_id)
    assert about is not None, "a select of counts gives a row"
    return Content(
        facts=joined.facts(knowledge=about["knowledge"]),
        outcomes=joined.outcomes + about["facts"] + about["knowledge"],
        missing=missing_facts(await unmet(connection, window_id), about["unrewarded"]),
        contradictions=joined.contradictions(about_runs=about["contradicted"]),
        digests={kind: about[f"{kind}_digest"] for kind in ("reward", "fact", "knowledge")},
    )


# With the fields of joined_domain.Seen. What lies outside is here to be compared, unless it is expected.
SEEN = """
with expected as (
    select distinct substr(e, 12) as market
      from trajectories t cross join lateral unnest(t.expects) e
     where t.window_id = $1 and not t.late and e like 'resolution:%'
), inside as (
    select * from outcomes
     where kind in ('price', 'resolution', 'metric') and occurred_at >= $2 and occurred_at < $3
)
select kind, name, value, data, occurred_at, event_id, source, contradicted, true as counts from inside
union all
select kind, name, value, data, occurred_at, event_id, source, contradicted,
       occurred_at >= $3 and name in (select market from expected)
  from outcomes
 where kind = 'resolution' and (occurred_at < $2 or occurred_at >= $3)
   and name in (select market from expected union select name from inside where kind = 'resolution')
 order by occurred_at, event_id, source
"""

# Rewards as the view has them: of each run the last one. Digests are in the order of the runs and of the facts' times.
ABOUT_RUNS = """
with runs as (select agent_id, trajectory_id from trajectories where window_id = $1 and not late),
     facts as (select o.* from outcomes o join runs using (agent_id, trajectory_id)),
     known as (select * from facts where kind = 'knowledge'
               union all
               select * from outcomes where window_id = $1 and kind = 'knowledge' and agent_id is null),
     rewarded as (select distinct on (agent_id, trajectory_id) agent_id, trajectory_id, value
                    from facts where kind = 'trajectory' and name = 'reward'
                   order by agent_id, trajectory_id, occurred_at desc, event_id desc, source desc)
select (select count(*) from facts where kind = 'trajectory') as facts,
       (select count(*) from known) as knowledge,
       (select count(*) from runs) - (select count(*) from rewarded) as unrewarded,
       (select count(*) from facts where kind = 'trajectory' and contradicted)
     + (select count(*) from known where contradicted) as contradicted,
       (select md5(string_agg(jsonb_build_array(agent_id, trajectory_id, value)::text, ''
                              order by agent_id, trajectory_id)) from rewarded) as reward_digest,
       (select md5(string_agg(jsonb_build_array(agent_id, trajectory_id, data)::text, ''
                              order by agent_id, trajectory_id, occurred_at, event_id, source))
          from facts where kind = 'trajectory' and name <> 'reward') as fact_digest,
       (select md5(string_agg(jsonb_build_array(agent_id, trajectory_id, data)::text, ''
                              order by agent_id nulls first, trajectory_id, occurred_at, event_id, source))
          from known) as knowledge_digest
"""

UNMET = """
with runs as (select agent_id, trajectory_id, expects from trajectories
               where window_id = $1 and not late and expects <> '{}'),
     wanted as (select distinct r.agent_id, r.trajectory_id, e as expected, split_part(e, ':', 1) as kind,
                       substr(e, strpos(e, ':') + 1) as name
                  from runs r cross join lateral unnest(r.expects) e)
select expected, count(*)::integer as runs
  from wanted, (select starts_at, ends_at from windows where window_id = $1) w
 where not case
       when kind in ('reward', 'fact') then exists (
            select from outcomes o
             where o.agent_id = wanted.agent_id and o.trajectory_id = wanted.trajectory_id
               and o.kind = 'trajectory' and o.name = wanted.name)
       when kind = 'knowledge' then exists (
            select from outcomes o where o.kind = 'knowledge' and o.window_id = $1 and o.agent_id is null)
         or exists (
            select from outcomes o where o.kind = 'knowledge' and o.agent_id = wanted.agent_id
               and o.trajectory_id = wanted.trajectory_id)
       when kind = 'resolution' then exists (
            select from outcomes o
             where o.kind = 'resolution' and o.name = wanted.name and o.occurred_at >= w.starts_at)
       else exists (
            select from outcomes o where o.kind = wanted.kind and o.name = wanted.name
               and o.occurred_at >= w.starts_at and o.occurred_at < w.ends_at)
       end
 group by expected order by expected
"""

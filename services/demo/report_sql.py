"""Every number of the demo's report, as SQL that can be run again: ``docs/report.md`` quotes these statements.

Variables stand as psql writes them, ``:'policy'``, so that a statement can be pasted into ``psql -v policy=default``.
Rewards are ``assignments.counted``: the reward of record of each started run for the version it was assigned, with
a missing end and a fallback at the window's worst (invariant 9).
"""

from __future__ import annotations

# Student's t at 97.5 %, n - 1 degrees of freedom (Abramowitz and Stegun 26.7.5), right to 0.001 from 4 on.
T_975 = """(1.959964 + 2.372270 / (n - 1) + 2.822485 / (n - 1) ^ 2
             + 2.555850 / (n - 1) ^ 3 + 1.589537 / (n - 1) ^ 4)"""

TOTALS = """\
select (select count(*) from windows where state = 'closed' and trajectories > 0)  as windows,
       (select count(*) from trajectories where policy = :'policy')                 as trajectories,
       (select count(*) from trajectories where policy = :'policy' and late)        as late,
       (select count(*) from llm_calls where recorded)                              as llm_calls,
       (select count(*) from groups where policy = :'policy' and state = 'scored')  as groups_scored,
       (select count(*) from groups where policy = :'policy' and state = 'tie')     as groups_tied,
       (select count(*) from judgments)                                             as judgments,
       (select string_agg(distinct judge, ', ') from judgments)                     as judge,
       (select count(*) from batches where policy = :'policy' and state = 'trained') as batches,
       (select count(*) from assignments where policy = :'policy' and penalty is not null) as penalties"""

VERSIONS = """\
with seen as (
  select version, window_id, count(*) as runs, avg(counted) as reward
    from assignments where policy = :'policy' and counted is not null group by version, window_id
), paired as (
  select a.version, a.window_id, avg(a.reward - b.reward) as difference
    from (select version, window_id, scenario_id, avg(counted) as reward
            from assignments where policy = :'policy' group by 1, 2, 3) a
    join (select window_id, scenario_id, avg(counted) as reward
            from assignments where policy = :'policy' and version = 'v0' group by 1, 2) b using (window_id, scenario_id)
   where a.version <> 'v0' group by a.version, a.window_id
), compared as (
  select version, n, mean, case when n >= 5 then sd / sqrt(n) * <t> end as half
    from (select version, count(*) as n, avg(difference) as mean, stddev_samp(difference) as sd
            from paired group by version) s
)
select m.version, m.parent, m.method, b.batch_id, b.groups as batch_groups,
       (select count(*) from batch_trajectories t where t.batch_id = b.batch_id and t.trained) as batch_trained,
       m.note, d.state, d.share, d.reason, d.control, d.decided_at, d.evidence,
       s.windows, s.runs, s.reward, i.n as paired_windows, i.mean as difference,
       i.mean - i.half as lower, i.mean + i.half as upper
  from models m
  left join batches b using (batch_id)
  left join deployments d on d.policy = m.policy and d.version = m.version
  left join (select version, count(*) as windows, sum(runs) as runs, sum(runs * reward) / sum(runs) as reward
               from seen group by version) s on s.version = m.version
  left join compared i on i.version = m.version
 where m.policy = :'policy'
 order by m.number""".replace("<t>", T_975)

REWARDS_BY_WINDOW = """\
select w.window_id, w.starts_at, a.version, count(*) as runs, avg(a.counted) as reward
  from assignments a join windows w using (window_id)
 where a.policy = :'policy' and a.counted is not null
 group by w.window_id, w.starts_at, a.version
 order by w.starts_at, a.version"""

ORACLE_BY_WINDOW = """\
select w.window_id, w.starts_at, avg(o.value) as reward
  from outcomes o join windows w on o.occurred_at >= w.starts_at and o.occurred_at < w.ends_at
 where o.kind = 'metric' and o.name = 'oracle_reward' and w.trajectories > 0
 group by w.window_id, w.starts_at
 order by w.starts_at"""

DECISIONS = """\
select version, state, reason, control, decided_at, evidence
  from deployments
 where policy = :'policy' and decided_at is not null
 order by decided_at"""

# The measure that decides whether the loop closed: a version against the concurrent base, over the windows that
# began after its promotion was decided, so that no window of its own trial is among them.
AFTER_PROMOTION = """\
with arms as (
  select a.window_id, w.starts_at, a.scenario_id,
         avg(a.counted) filter (where a.version = :'version') as promoted,
         avg(a.counted) filter (where a.version = 'v0')       as base
    from assignments a join windows w using (window_id)
   where a.policy = :'policy'
     and w.starts_at >= (select decided_at from deployments where policy = :'policy' and version = :'version')
   group by a.window_id, w.starts_at, a.scenario_id
)
select window_id, starts_at, count(*) as scenarios, avg(promoted - base) as difference
  from arms
 where promoted is not null and base is not null
 group by window_id, starts_at
 order by starts_at"""

MEASURE = """\
select n as windows, mean as difference, mean - half as lower, mean + half as upper
  from (select n, mean, sd / sqrt(n) * <t> as half
          from (select count(*) as n, avg(difference) as mean, stddev_samp(difference) as sd
                  from (<differences>) by_window) moments
         where n >= 5) measured""".replace("<t>", T_975).replace("<differences>", AFTER_PROMOTION)

LABELS = """\
select m.version, t.label, count(*) as runs, count(*) filter (where t.trained) as trained
  from models m join batch_trajectories t using (batch_id)
 where m.policy = :'policy'
 group by m.number, m.version, t.label
 order by m.number, t.label"""

STATEMENTS = {
    "Totals": TOTALS,
    "Versions": VERSIONS,
    "What each version was trained on": LABELS,
    "Reward by window and version": REWARDS_BY_WINDOW,
    "What an oracle would have earned": ORACLE_BY_WINDOW,
    "Promotions and rollbacks": DECISIONS,
    "Promoted version against the concurrent base, by window": AFTER_PROMOTION,
    "The measure that decides": MEASURE,
}


def for_psycopg(statement: str) -> str:
    """The same statement with the driver's placeholders."""
    for name in ("policy", "version"):
        statement = statement.replace(f":'{name}'", f"%({name})s")
    return statement

-- recorder ---------------------------------------------------------------------------------------
-- Who says it: what the gateway saw, or what an agent tells of itself. What lay here before counts as told.
alter table bodies add column if not exists witnessed boolean not null default false;
alter table llm_calls add column if not exists witnessed boolean not null default false;

-- A clock that told a time before 2000 (asyncpg writes the year 1 as -infinity) kept every window from closing. Its runs
-- go where they would be placed now: into the window of when they came, flagged, and late where it is closed. A window
-- that something was concluded from stays as it is.
create temporary table impossible on commit drop as
select window_id, length_s from windows w
 where ends_at <= '2000-01-01T00:00:00Z' and announced_at is null
   and not exists (select from settlements s where s.window_id = w.window_id);

create temporary table moved on commit drop as
select agent_id, trajectory_id, was, length_s, came_at, starts_at,
       to_char(starts_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI' || case when mod(length_s, 60) = 0 then '' else ':SS' end)
       || case when length_s = 3600 then '' else '~' || length_s || 's' end as window_id
  from (select t.agent_id, t.trajectory_id, t.window_id as was, i.length_s, t.first_stored_at as came_at,
               to_timestamp(floor(extract(epoch from t.first_stored_at) / i.length_s) * i.length_s) as starts_at
          from trajectories t join impossible i using (window_id)) as placed;

insert into windows (window_id, starts_at, ends_at, length_s)
select distinct window_id, starts_at, starts_at + make_interval(secs => length_s), length_s from moved
on conflict do nothing;

update trajectories t
   set window_id = w.window_id,
       scenario_id = case when t.scenario_id = m.was then w.window_id else t.scenario_id end,
       late = w.state = 'closed' or t.first_sequence > coalesce(w.barrier_sequence, t.first_sequence)
  from moved m join windows w using (window_id)
 where t.agent_id = m.agent_id and t.trajectory_id = m.trajectory_id;

update windows w set late = n.late
  from (select window_id, count(*) as late from trajectories
         where late and window_id in (select window_id from moved) group by window_id) n
 where w.window_id = n.window_id and w.state = 'closed';

delete from windows w using impossible i where w.window_id = i.window_id;
update windows set starts_at = '0001-01-01T00:00:00.000001Z' where starts_at = '-infinity';

update trajectories set started_at = first_stored_at, clock_skewed = true
 where started_at < '2000-01-01T00:00:00Z' or started_at = 'infinity';
update trajectories set ended_at = greatest(started_at, first_stored_at), consistent = false
 where ended_at < '2000-01-01T00:00:00Z' or ended_at = 'infinity';
with mended as (
    update steps s set occurred_at = t.first_stored_at from trajectories t
     where s.agent_id = t.agent_id and s.trajectory_id = t.trajectory_id
       and (s.occurred_at < '2000-01-01T00:00:00Z' or s.occurred_at = 'infinity')
    returning s.agent_id, s.trajectory_id
)
update trajectories t set consistent = false from mended m
 where t.agent_id = m.agent_id and t.trajectory_id = m.trajectory_id;
update llm_calls c set occurred_at = t.first_stored_at from trajectories t
 where c.agent_id = t.agent_id and c.trajectory_id = t.trajectory_id
   and (c.occurred_at < '2000-01-01T00:00:00Z' or c.occurred_at = 'infinity');

-- outcome_tracker --------------------------------------------------------------------------------
update outcomes set occurred_at = received_at where occurred_at = '-infinity';

-- every service, each its own rows -----------------------------------------------------------------
create table if not exists set_aside (                -- what a sweep could not handle, while the rest went on
    service text not null,
    kind    text not null,                            -- what was to be done
    key     text not null,                            -- with which row
    reason  text not null,
    since   timestamptz not null default now(),
    last_at timestamptz not null default now(),
    count   integer not null default 1,
    primary key (service, kind, key)
);

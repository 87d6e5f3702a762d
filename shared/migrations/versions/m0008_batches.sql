-- trainer ----------------------------------------------------------------------------------------
-- What a run can carry, read from its bodies once: readiness and plans are made of this, bodies are read to train.
create table if not exists readings (
    agent_id      text not null,
    trajectory_id text not null,
    versions      text[] not null,                       -- that answered it; null among them where a call names none
    has_tokens    boolean not null,
    witnessed     boolean not null,                      -- the gateway saw each of its answered calls
    no_gradient   text,                                  -- why its tokens cannot be trained on by gradient; null: can
    no_imitation  text,                                  -- why its words cannot be imitated; null: can
    read_at       timestamptz not null default now(),
    primary key (agent_id, trajectory_id),
    foreign key (agent_id, trajectory_id) references trajectories
);

-- Of a batch that failed, its groups go back; a run that training cannot use is left out of every later batch.
alter table batch_trajectories add column if not exists unusable boolean not null default false;
create index if not exists batch_trajectories_unusable on batch_trajectories (agent_id, trajectory_id) where unusable;
alter table batches add column if not exists excused boolean not null default false;  -- the world failed, not its runs
create index if not exists batches_failed on batches (policy, finished_at) where state in ('failed', 'trained');
create index if not exists groups_scored on groups (policy, group_id) where state = 'scored';

create or replace view batch_overview as
select b.batch_id, b.policy, b.parent_version, m.version, b.state, b.method, b.groups, b.trajectories, b.attempts,
       b.failure, b.created_at, b.finished_at, coalesce(t.trained, 0) as trained,
       coalesce(t.left_out, '{}') as left_out             -- reason -> runs
  from batches b
  left join models m using (batch_id)
  left join lateral (
       select sum(runs) filter (where left_out is null)::bigint as trained,
              jsonb_object_agg(left_out, runs) filter (where left_out is not null) as left_out
         from (select left_out, count(*) as runs
                 from batch_trajectories where batch_id = b.batch_id group by left_out) counted) t on true;

create or replace view window_readings as                 -- what the judged runs of each window can carry, at best
select g.window_id, g.policy, count(*) as runs,
       count(*) filter (where r.no_gradient is null and r.witnessed) as tokens,
       count(*) filter (where r.no_gradient is null and not r.witnessed) as unwitnessed_tokens,
       count(*) filter (where r.no_gradient is not null and r.no_imitation is null) as words,
       count(*) filter (where r.no_gradient is not null and r.no_imitation is not null) as nothing,
       count(*) filter (where r.agent_id is null) as unread,
       mode() within group (order by r.no_gradient) as reason   -- the commonest why no gradient can be had
  from groups g
  join group_members m using (group_id)
  left join readings r using (agent_id, trajectory_id)
 where g.state = 'scored' and m.left_out is null
 group by g.window_id, g.policy;

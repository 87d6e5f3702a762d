-- recorder ---------------------------------------------------------------------------------------
-- What a run said at its start that the world will tell: the windows of such runs are settled once it is there.
alter table trajectories add column expects text[] not null default '{}';
create index trajectories_expects on trajectories using gin (expects) where expects <> '{}';

-- The lengths that windows have had: a fact belongs to one window of each. Read as a walk along the index.
create index windows_length on windows (length_s);
create view window_lengths as
with recursive walk as (
    (select length_s from windows order by length_s limit 1)
    union all
    select (select w.length_s from windows w where w.length_s > walk.length_s order by w.length_s limit 1)
      from walk where walk.length_s is not null)
select length_s from walk where length_s is not null;

-- outcome_tracker --------------------------------------------------------------------------------
alter table outcomes
    add column extra        jsonb not null default '{}',       -- fields of the event that the contract does not know
    add column contradicted boolean not null default false;    -- its id came again with other content
alter table outcomes alter column extra set statistics 0;      -- texts, as those of data
create index outcomes_resolutions on outcomes (name) where kind = 'resolution';

alter table settlements
    add column contradictions text[] not null default '{}',    -- facts of the window that do not agree
    add column changed        text[] not null default '{}',    -- of a correction: what is new in it
    add column digests        jsonb not null default '{}',     -- of the facts about runs and of knowledge, to compare by
    add column pull_at        timestamptz not null default now(),  -- when the pull sources are next asked
    add column pulled         jsonb not null default '{}';     -- source -> null, or why it gave nothing

-- Windows with facts that came after their newest settlement looked. A row goes when they are looked at again.
create table corrections_due (
    window_id  text primary key references windows,
    touched_at timestamptz not null default now(),
    forced     boolean not null default false                  -- an operator asked: at once, and however late
);

-- The reward of record: the last fact named "reward" about a run, by its own time; of one instant the newest id.
-- Not by arrival: facts that come in another order, or over a stream that was made anew, mean the same.
create or replace view rewards as
select distinct on (agent_id, trajectory_id) agent_id, trajectory_id, value as reward, source, event_id, received_at
from outcomes
where kind = 'trajectory' and name = 'reward'
order by agent_id, trajectory_id, occurred_at desc, event_id desc, source desc;

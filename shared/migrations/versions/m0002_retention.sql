-- recorder ---------------------------------------------------------------------------------------
create table forgotten_runs (                         -- a run's tombstone: its bodies are gone and none comes back
    agent_id      text not null,
    trajectory_id text not null,
    forgotten_at  timestamptz not null default now(),
    who           text not null,
    reason        text,
    events        integer not null default 0,         -- whose bodies were erased
    size_bytes    bigint not null default 0,          -- of those events, as they were sent
    primary key (agent_id, trajectory_id),
    foreign key (agent_id, trajectory_id) references trajectories
);

create table retention (                              -- how far each policy's bodies are gone; only ever moves on
    policy       text primary key,                    -- '' for every policy that has no row of its own
    gone_through date not null,                       -- events of this day and before are refused
    changed_at   timestamptz not null default now()
);

alter table trajectories add column consistent boolean not null default true;  -- its events agree on policy and start
alter table llm_calls add column has_prompt boolean;  -- what came of it has messages, or extends a call; null before this column was
alter table windows add column quality_checks jsonb;  -- share of its runs that hold each check, 0 to 1, by name

-- scorer -----------------------------------------------------------------------------------------
create table judge_cache_runs (                       -- which runs a cached judgment is about
    content_sha256 bytea not null references judge_cache on delete cascade,
    agent_id       text not null,
    trajectory_id  text not null,
    primary key (content_sha256, agent_id, trajectory_id)
);
create index judge_cache_runs_run on judge_cache_runs (agent_id, trajectory_id);

-- Statistics keep samples of a column's values, texts among them, in a catalog that no vacuum of ours reaches.
alter table bodies alter column body set statistics 0;
alter table steps alter column action_type set statistics 0;
alter table outcomes alter column data set statistics 0;
alter table judgments alter column explanation set statistics 0;
alter table judge_cache alter column reply set statistics 0;
do $$
begin
    delete from pg_statistic s using pg_attribute a
     where a.attrelid = s.starelid and a.attnum = s.staattnum
       and (a.attrelid, a.attname) in (('bodies'::regclass, 'body'), ('bodies_default'::regclass, 'body'),
                                       ('steps'::regclass, 'action_type'), ('outcomes'::regclass, 'data'),
                                       ('judgments'::regclass, 'explanation'), ('judge_cache'::regclass, 'reply'));
exception when insufficient_privilege then null;      -- not a superuser: old samples stay until the table is analyzed
end $$;

-- One writing service a table, named above its tables. Ids of runs are (agent_id, trajectory_id).

-- recorder ---------------------------------------------------------------------------------------
create table windows (
    window_id        text primary key,
    starts_at        timestamptz not null,
    ends_at          timestamptz not null,
    length_s         integer not null check (length_s >= 1),
    state            text not null default 'open' check (state in ('open', 'closed')),
    close_requested  boolean not null default false,
    barrier_created  timestamptz,            -- creation time of the stream that the barrier counts in
    barrier_sequence bigint,                 -- its last sequence when the deadline had passed: later is late
    revision         integer not null default 0,
    agents           integer not null default 0,
    trajectories     integer not null default 0,
    late             integer not null default 0,
    quality          double precision,
    closed_at        timestamptz,
    announced_at     timestamptz,
    unique (starts_at, length_s)
);
create index windows_open on windows (ends_at) where state = 'open';
create index windows_unannounced on windows (closed_at) where state = 'closed' and announced_at is null;

create table trajectories (
    agent_id       text not null,
    trajectory_id  text not null,
    policy         text not null,
    window_id      text not null references windows,
    scenario_id    text not null,
    started_at     timestamptz not null,
    started        boolean not null default false,   -- its trajectory.started has come
    ended_at       timestamptz,
    status         text not null default 'open'
                   check (status in ('open', 'completed', 'failed', 'truncated')),
    step_count     integer,                          -- as the agent says at the end
    model_name     text,
    model_version  text,
    late           boolean not null default false,
    clock_skewed   boolean not null default false,
    first_sequence bigint not null,
    ended_sequence bigint,                           -- of the end that was stored: what was sent before it comes first
    first_stored_at timestamptz not null default now(),
    primary key (agent_id, trajectory_id)
);
create index trajectories_window on trajectories (window_id, policy, scenario_id);
create index trajectories_open on trajectories (window_id) where status = 'open';

create table steps (
    agent_id      text not null,
    trajectory_id text not null,
    step          integer not null,
    event_id      uuid not null,
    occurred_at   timestamptz not null,
    action_type   text,
    success       boolean,
    answered      boolean,                           -- its action has a result or an error; null without an action
    reward        double precision,                  -- the agent's own word: never the reward of record
    primary key (agent_id, trajectory_id, step),
    foreign key (agent_id, trajectory_id) references trajectories
);

create table llm_calls (
    agent_id          text not null,
    trajectory_id     text not null,
    call_id           text not null,
    base_call_id      text,
    step              integer not null,
    event_id          uuid not null,                 -- of the event that brought its content, where it has come
    recorded          boolean not null,              -- false while a step has only referred to it
    purpose           text,
    model             text,
    model_version     text,
    prompt_tokens     integer,
    completion_tokens integer,
    has_token_ids     boolean not null default false,
    latency_ms        double precision,
    occurred_at       timestamptz not null,
    primary key (agent_id, trajectory_id, call_id),
    foreign key (agent_id, trajectory_id) references trajectories
);

create table bodies (
    day           date not null,                     -- of the event id, so that one id has one day
    agent_id      text not null,
    event_id      uuid not null,
    trajectory_id text not null,
    kind          text not null,
    sequence      bigint not null,
    received_at   timestamptz not null default now(),
    sha256        bytea not null,                    -- of the JSON object as it was sent
    size_bytes    integer not null,
    body          bytea,                             -- zlib; null once forgotten
    primary key (day, agent_id, event_id)
) partition by range (day);
create table bodies_default partition of bodies default;
create index bodies_run on bodies (agent_id, trajectory_id);

create table seen_agents (
    agent_id     text primary key,
    first_seen   timestamptz not null,
    last_seen    timestamptz not null,
    versions     text[] not null default '{}'
);

-- outcome_tracker --------------------------------------------------------------------------------
create table outcomes (
    source        text not null,
    event_id      uuid not null,
    kind          text not null check (kind in ('price', 'resolution', 'metric', 'trajectory', 'knowledge')),
    occurred_at   timestamptz not null,
    received_at   timestamptz not null default now(),
    sequence      bigint not null,
    name          text,                              -- symbol, market, metric or the fact's name
    value         double precision,
    window_id     text,                              -- of knowledge about a window
    agent_id      text,                              -- of a fact about one run
    trajectory_id text,
    data          jsonb not null,
    primary key (source, event_id)
);
create index outcomes_run on outcomes (agent_id, trajectory_id) where agent_id is not null;
create index outcomes_time on outcomes (occurred_at);
create index outcomes_window on outcomes (window_id) where window_id is not null;

create table settlements (
    window_id        text not null references windows,
    revision         integer not null,
    close_revision   integer not null,
    state            text not null default 'waiting' check (state in ('waiting', 'settled')),
    wait_from        timestamptz not null default now(),
    barrier_created  timestamptz,
    barrier_sequence bigint,
    outcomes         integer not null default 0,
    facts            jsonb not null default '{}',    -- prices, resolutions and metrics of [start, end)
    missing          text[] not null default '{}',
    settled_at       timestamptz,
    announced_at     timestamptz,
    primary key (window_id, revision)
);
create index settlements_waiting on settlements (wait_from) where state = 'waiting';
create index settlements_unannounced on settlements (settled_at) where state = 'settled' and announced_at is null;

-- The reward of record, one definition for demo, canary and SQL: the last fact named "reward" about a run.
create view rewards as
select distinct on (agent_id, trajectory_id) agent_id, trajectory_id, value as reward, source, event_id, received_at
from outcomes
where kind = 'trajectory' and name = 'reward'
order by agent_id, trajectory_id, sequence desc;

-- scorer -----------------------------------------------------------------------------------------
create table groups (
    group_id     text primary key,
    policy       text not null,
    window_id    text not null references windows,
    scenario_id  text not null,
    part         integer not null default 0,
    homogeneous  boolean not null,
    state        text not null check (state in ('pending', 'scored', 'tie', 'small', 'failed')),
    revision     integer not null default 0,         -- of its newest judgment
    judge        text,
    spread       double precision,
    failure      text,
    created_at   timestamptz not null default now(),
    judged_at    timestamptz,
    announced_at timestamptz,
    attempts     integer not null default 0,             -- times that a judge was asked about it
    not_before   timestamptz not null default now(),     -- a lease while it is judged, a pause after a failure
    unique (policy, window_id, scenario_id, part)
);
create index groups_window on groups (window_id);
create index groups_waiting on groups (not_before) where state in ('pending', 'failed');
create index groups_unannounced on groups (judged_at) where judged_at is not null and announced_at is null;

create table group_members (
    group_id      text not null references groups,
    agent_id      text not null,
    trajectory_id text not null,
    left_out      text,                              -- why it is not judged; null where it is
    primary key (group_id, agent_id, trajectory_id),
    foreign key (agent_id, trajectory_id) references trajectories
);
create index group_members_run on group_members (agent_id, trajectory_id);

create table judgments (
    group_id      text not null references groups,
    revision      integer not null,
    agent_id      text not null,
    trajectory_id text not null,
    judge         text not null,
    model         text,
    rubric        text not null,
    score         double precision not null check (score >= 0 and score <= 1),
    rank          integer not null check (rank >= 1),
    explanation   text,
    judged_at     timestamptz not null default now(),
    primary key (group_id, revision, agent_id, trajectory_id),
    foreign key (agent_id, trajectory_id) references trajectories
);

create table judge_cache (
    content_sha256    bytea primary key,
    judge             text not null,
    model             text not null,
    reply             jsonb not null,
    prompt_tokens     integer,
    completion_tokens integer,
    latency_ms        double precision,
    created_at        timestamptz not null default now()
);

-- trainer ----------------------------------------------------------------------------------------
create table artifacts (
    sha256     text primary key check (sha256 ~ '^[0-9a-f]{64}$'),
    kind       text not null default 'checkpoint',
    uri        text not null,
    size_bytes bigint not null,
    files      jsonb not null,                       -- name -> sha256
    created_at timestamptz not null default now()
);

create table batches (
    batch_id        text primary key,
    policy          text not null,
    parent_version  text not null,
    method          text not null check (method in ('grpo', 'imitation')),
    state           text not null default 'claimed' check (state in ('claimed', 'trained', 'failed', 'empty')),
    fencing_token   bigint not null default 1,
    lease_until     timestamptz not null,
    attempts        integer not null default 1,
    groups          integer not null,
    trajectories    integer not null,
    config          jsonb not null default '{}',
    metrics         jsonb not null default '{}',
    failure         text,
    wandb_run       text,
    created_at      timestamptz not null default now(),
    finished_at     timestamptz
);
create unique index batches_one_at_a_time on batches (policy) where state = 'claimed';

create table batch_trajectories (
    batch_id      text not null references batches,
    agent_id      text not null,
    trajectory_id text not null,
    group_id      text not null references groups,
    revision      integer not null,
    label         text not null check (label in ('exact', 'stale', 'imitation', 'mixed')),
    advantage     double precision not null,
    weight        double precision not null default 1,
    trained       boolean not null,
    left_out      text,
    primary key (batch_id, agent_id, trajectory_id),
    foreign key (agent_id, trajectory_id) references trajectories
);
create index batch_trajectories_group on batch_trajectories (group_id);
create index batch_trajectories_run on batch_trajectories (agent_id, trajectory_id);

create table models (
    policy          text not null,
    version         text not null,
    number          integer not null check (number >= 0),
    parent          text,
    batch_id        text unique references batches,
    method          text not null check (method in ('base', 'grpo', 'imitation')),
    artifact_sha256 text not null references artifacts,
    metrics         jsonb not null default '{}',
    note            text,
    created_at      timestamptz not null default now(),
    announced_at    timestamptz,
    primary key (policy, version),
    unique (policy, number)
);
create index models_unannounced on models (created_at) where announced_at is null;

-- deployer ---------------------------------------------------------------------------------------
create table deployments (
    policy        text not null,
    version       text not null,
    state         text not null check (state in ('verifying', 'canary', 'promoted', 'superseded', 'rolled_back', 'refused')),
    share         double precision not null default 0,
    control       text,                              -- the version it is measured against
    effective_from timestamptz,                      -- start of the first window it was routed in
    deadline_at   timestamptz,
    reason        text,
    evidence      jsonb not null default '{}',
    decision      integer not null default 0,        -- counts verdicts on this version, for message ids
    created_at    timestamptz not null default now(),
    decided_at    timestamptz,
    announced_at  timestamptz,
    primary key (policy, version),
    foreign key (policy, version) references models
);
create unique index deployments_one_promoted on deployments (policy) where state = 'promoted';
create unique index deployments_one_undecided on deployments (policy) where state in ('verifying', 'canary');
create index deployments_unannounced on deployments (decided_at) where decided_at is not null and announced_at is null;

create table routes (                                 -- every route document that ever applied, in order
    policy         text not null,
    revision       integer not null,
    effective_from timestamptz not null,
    document       jsonb not null,
    created_at     timestamptz not null default now(),
    primary key (policy, revision)
);

create table assignments (                            -- which version each run of a resolved window counts for
    agent_id      text not null,
    trajectory_id text not null,
    policy        text not null,
    window_id     text not null references windows,
    scenario_id   text not null,
    version       text not null,
    reward        double precision,                   -- of record; null where the world said nothing
    counted       double precision,                   -- reward as counted: a missing end or a fallback at its worst
    penalty       text,                               -- why counted differs from reward
    primary key (agent_id, trajectory_id),
    foreign key (agent_id, trajectory_id) references trajectories
);
create index assignments_window on assignments (window_id, policy, version);

create table evidence (                               -- one row a window, candidate and control
    policy       text not null,
    version      text not null,
    control      text not null,
    window_id    text not null references windows,
    runs         integer not null,
    control_runs integer not null,
    mean         double precision not null,
    control_mean double precision not null,
    difference   double precision not null,           -- mean over scenarios that both arms met
    created_at   timestamptz not null default now(),
    primary key (policy, version, control, window_id)
);

create table incidents (
    incident_id bigint generated always as identity primary key,
    policy      text not null,
    version     text,
    kind        text not null,
    detail      jsonb not null default '{}',
    at          timestamptz not null default now()
);

create table quarantines (
    policy  text not null,
    version text not null,
    reason  text not null,
    at      timestamptz not null default now(),
    primary key (policy, version)
);

-- admin ------------------------------------------------------------------------------------------
create table agents (
    agent_id   text primary key,
    public_key text,
    created_at timestamptz not null default now(),
    revoked_at timestamptz
);

create table tokens (
    token_sha256 bytea primary key,
    name         text not null,
    created_at   timestamptz not null default now(),
    revoked_at   timestamptz
);

create table audit (
    audit_id bigint generated always as identity primary key,
    at       timestamptz not null default now(),
    who      text not null,
    command  text not null,
    request  jsonb not null default '{}',
    reply    jsonb not null default '{}'
);

-- scorer -----------------------------------------------------------------------------------------
-- disputed: the judge's looks at it disagree too much; it has looks and no scores, and is not trained on.
alter table groups drop constraint groups_state_check;
alter table groups
    add constraint groups_state_check check (state in ('pending', 'scored', 'tie', 'small', 'failed', 'disputed')),
    add column disagreement    double precision,              -- of its newest judgment, between looks
    add column wanted_revision integer not null default 1,    -- over revision where a judgment is to be made
    add column wanted_judge    text,                          -- by whom and under which rubric; null: as the settings say
    add column wanted_rubric   text,
    add column waits_for       text;                          -- why it is not judged though nothing failed: 'budget'
alter table groups add column wanted boolean not null         -- whether a judgment of it is to be made
    generated always as (state <> 'small' and (state in ('pending', 'failed') or revision < wanted_revision)) stored;
create index groups_wanted on groups (not_before) where wanted;
drop index groups_waiting;
create index groups_waits on groups (waits_for) where waits_for is not null;

create table looks (                                          -- a judge's questions about a group, one row each
    group_id          text not null references groups,
    revision          integer not null,
    look              integer not null check (look >= 0),
    hindsight         boolean not null,                       -- false: it calibrates the judge and counts for no score
    judge             text not null,
    model             text,
    rubric            text not null,
    content_sha256    bytea not null,                         -- of the question; the raw reply is in judge_cache under it
    hindsight_sha256  bytea,
    prompt_tokens     integer,
    completion_tokens integer,
    cost_usd          double precision,                       -- 0 where the answer was remembered; null without a price
    latency_ms        double precision not null,
    remembered        boolean not null,
    looked_at         timestamptz not null default now(),
    primary key (group_id, revision, look, hindsight)
);

create table look_scores (
    group_id      text not null,
    revision      integer not null,
    look          integer not null,
    hindsight     boolean not null,
    agent_id      text not null,
    trajectory_id text not null,
    place         integer not null check (place >= 1),        -- in the order shown; identical members share one
    score         double precision not null check (score >= 0 and score <= 1),
    rank          integer not null check (rank >= 1),
    explanation   text,
    strengths     text[] not null default '{}',
    weaknesses    text[] not null default '{}',
    primary key (group_id, revision, look, hindsight, agent_id, trajectory_id),
    foreign key (group_id, revision, look, hindsight) references looks on delete cascade,
    foreign key (agent_id, trajectory_id) references trajectories
);
create index look_scores_run on look_scores (agent_id, trajectory_id);

alter table judge_cache add column cost_usd double precision;

create table if not exists judge_cache_runs (                 -- which runs a remembered answer is about
    content_sha256 bytea not null references judge_cache on delete cascade,
    agent_id       text not null,
    trajectory_id  text not null,
    primary key (content_sha256, agent_id, trajectory_id)
);
create index if not exists judge_cache_runs_run on judge_cache_runs (agent_id, trajectory_id);

create table judge_claims (                                   -- a question that somebody asks at this moment
    content_sha256 bytea primary key,
    holder         uuid not null,
    held_until     timestamptz not null
);

create table judge_spend (                                    -- by UTC day; what the budget counts
    day               date primary key,
    calls             bigint not null default 0,
    prompt_tokens     bigint not null default 0,
    completion_tokens bigint not null default 0,
    cost_usd          double precision not null default 0,
    reserved_tokens   bigint not null default 0               -- of calls that have not ended, at the most they may take
);

-- Statistics keep samples of a column's values: no text about a run is to stay in them when the run is forgotten.
alter table look_scores alter column explanation set statistics 0;
alter table look_scores alter column strengths set statistics 0;
alter table look_scores alter column weaknesses set statistics 0;

-- Everything that is known of one member in one look, the raw reply with it.
create view judgment_looks as
select s.group_id, s.revision, s.look, s.hindsight, s.agent_id, s.trajectory_id, l.judge, l.model, l.rubric, s.place,
       s.score, s.rank, s.explanation, s.strengths, s.weaknesses, c.reply ->> 'text' as raw_reply, l.prompt_tokens,
       l.completion_tokens, l.cost_usd, l.latency_ms, l.remembered, l.hindsight_sha256, l.content_sha256, l.looked_at
  from look_scores s
  join looks l using (group_id, revision, look, hindsight)
  left join judge_cache c using (content_sha256);

-- How a judge's order of pairs stands to that of the rewards of record, in groups that were also looked at without
-- hindsight. concordant + discordant + tied pairs are all pairs; tau_b is Kendall's, over the pairs of all groups.
create view judge_calibration as
with sampled as (
    select l.group_id, l.revision, l.look, l.hindsight, l.judge, l.model, l.rubric
      from looks l
     where exists (select from looks o
                    where (o.group_id, o.revision) = (l.group_id, l.revision) and not o.hindsight)
), member as (
    select p.*, s.agent_id, s.trajectory_id, s.score, r.reward
      from sampled p
      join look_scores s using (group_id, revision, look, hindsight)
      join lateral (select o.value as reward from outcomes o
                     where o.agent_id = s.agent_id and o.trajectory_id = s.trajectory_id
                       and o.kind = 'trajectory' and o.name = 'reward'
                     order by o.sequence desc limit 1) r on true
), counted as (
    select g.policy, g.window_id, a.judge, a.model, a.rubric, a.hindsight,
           count(*) as pairs,
           count(*) filter (where sign(a.score - b.score) * sign(a.reward - b.reward) > 0) as concordant,
           count(*) filter (where sign(a.score - b.score) * sign(a.reward - b.reward) < 0) as discordant,
           count(*) filter (where a.score = b.score) as tied_by_judge,
           count(*) filter (where a.reward = b.reward) as tied_by_reward
      from member a
      join member b using (group_id, revision, look, hindsight)
      join groups g using (group_id)
     where (a.agent_id, a.trajectory_id) < (b.agent_id, b.trajectory_id)
     group by g.policy, g.window_id, a.judge, a.model, a.rubric, a.hindsight
)
select c.policy, c.window_id, w.starts_at, c.judge, c.model, c.rubric,
       case when c.hindsight then 'with_hindsight_circular' else 'without_hindsight' end as view,
       c.pairs, c.concordant, c.discordant, c.tied_by_judge, c.tied_by_reward,
       (c.concordant - c.discordant)
         / nullif(sqrt((c.pairs - c.tied_by_judge)::float8 * (c.pairs - c.tied_by_reward)), 0) as tau_b
  from counted c
  join windows w using (window_id);

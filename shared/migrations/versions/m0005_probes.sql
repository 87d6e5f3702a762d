-- scorer -----------------------------------------------------------------------------------------
create table judge_probes (                               -- a judge, model, rubric and endpoint before planted cases
    probe_id          bigint generated always as identity primary key,
    judge             text not null,
    model             text not null,
    rubric            text not null,
    endpoint          text not null,
    suite             text not null,                      -- the cases, by their hash
    asked_by          text not null,                      -- 'schedule', or who asked for it by hand
    state             text not null default 'running' check (state in ('running', 'passed', 'failed', 'unfinished')),
    pass_mark         double precision not null,
    cases             integer not null,
    passed            integer not null default 0,
    results           jsonb not null default '[]',        -- of each case so far: its scores, and what they broke
    calls             integer not null default 0,
    prompt_tokens     bigint not null default 0,
    completion_tokens bigint not null default 0,
    started_at        timestamptz not null default now(),
    heard_at          timestamptz not null default now(), -- the scorer that runs it lived
    finished_at       timestamptz
);
create index judge_probes_newest on judge_probes (judge, model, rubric, endpoint, started_at);

create table judge_releases (                             -- one row for each, kept: who let which failed probe pass
    probe_id    bigint primary key references judge_probes,
    who         text not null,
    reason      text not null,
    released_at timestamptz not null default now()
);

-- The newest verdict on each judge, and whether its judgments may be announced.
create view judge_standing as
select distinct on (p.judge, p.model, p.rubric, p.endpoint)
       p.judge, p.model, p.rubric, p.endpoint, p.probe_id, p.state, p.passed, p.cases, p.pass_mark, p.finished_at,
       r.who as released_by, r.reason as released_why, r.released_at,
       p.state = 'passed' or r.probe_id is not null as trusted
  from judge_probes p
  left join judge_releases r using (probe_id)
 where p.state in ('passed', 'failed')
 order by p.judge, p.model, p.rubric, p.endpoint, p.finished_at desc, p.probe_id desc;

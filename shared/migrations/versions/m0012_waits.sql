-- deployer ---------------------------------------------------------------------------------------
-- held: what it was trained from has fallen; it is not tried, and answers only where an operator deploys it.
alter table deployments drop constraint if exists deployments_state_check;
alter table deployments add constraint deployments_state_check
    check (state in ('verifying', 'canary', 'promoted', 'superseded', 'rolled_back', 'refused', 'held'));

-- every service, each the rows of its own -----------------------------------------------------------
create table if not exists wait_limits (                  -- what a service's settings say of how long things may take
    name    text primary key,
    service text not null,
    value   double precision not null
);
insert into wait_limits (service, name, value) values     -- the defaults, until the service has said its own
    ('recorder', 'grace_s', 300), ('recorder', 'run_s', 900),
    ('outcome_tracker', 'settle_s', 3600), ('outcome_tracker', 'correct_s', 86400),
    ('scorer', 'judge_rounds', 6), ('scorer', 'judge_s', 3600), ('scorer', 'probe_s', 86400),
    ('deployer', 'verify_s', 120), ('deployer', 'trial_s', 345600)
on conflict do nothing;

-- Everything in the loop that waits: what, for what, since when, and until when it may. A row past its ``until`` is
-- stuck: its owner ends or moves it before. What ended with a reason (refused, held, failed for good, disputed, small)
-- waits for nobody and is not here.
create or replace view waits as
with said as (
    select interval '5 minutes' as handover,              -- between two services, or into the broker
           max(value) filter (where name = 'judge_rounds') as judge_rounds,
           make_interval(secs => max(value) filter (where name = 'grace_s')) as grace,
           make_interval(secs => max(value) filter (where name = 'run_s')) as run,
           make_interval(secs => max(value) filter (where name = 'settle_s')) as settle,
           make_interval(secs => max(value) filter (where name = 'correct_s')) as correct,
           make_interval(secs => max(value) filter (where name = 'judge_s')) as judge,
           make_interval(secs => max(value) filter (where name = 'probe_s')) as probe,
           make_interval(secs => max(value) filter (where name = 'verify_s')) as verify,
           make_interval(secs => max(value) filter (where name = 'trial_s')) as trial
      from wait_limits
), open_window as (
    select w.window_id, w.starts_at, w.barrier_sequence, w.ends_at + said.grace as ended,
           (select max(t.started_at) + said.run from trajectories t
             where t.window_id = w.window_id and t.status = 'open' and not t.late) as runs_end
      from windows w, said where w.state = 'open'
), undecided as (
    select d.policy, d.version, d.state, coalesce(d.effective_from, d.created_at) as since,
           coalesce(d.deadline_at, d.created_at + case d.state when 'canary' then said.trial else said.verify end)
             + interval '1 minute' as until,
           case d.state when 'canary' then 'evidence of ' || d.version || ' against ' || coalesce(d.control, 'its control')
                        else 'an endpoint that answers as ' || d.version end as waits_for
      from deployments d, said where d.state in ('verifying', 'canary')
), untried as (
    select m.policy, m.version, coalesce(m.announced_at, m.created_at) as since,
           case when m.announced_at is null then 'the broker to take its announcement'
                when u.version is not null then 'the verdict on ' || u.version
                else 'the deployer to take it up' end as waits_for,
           coalesce(u.until, coalesce(m.announced_at, m.created_at)) + said.handover as until
      from said, models m left join undecided u using (policy)
     where not exists (select from deployments d where (d.policy, d.version) = (m.policy, m.version))
), waiting_group as (
    select g.window_id, g.policy, g.created_at,
           case when g.waits_for is not null then 'the judge''s ' || g.waits_for || ' of the next UTC day'
                when g.failure is not null then 'another try of the judge'
                when g.not_before > now() then 'the judge that holds it'
                else 'a judge that is free' end as waits_for,
           case when g.waits_for = 'budget'
                then (date_trunc('day', g.not_before at time zone 'UTC') + interval '1 day') at time zone 'UTC'
                else greatest(g.not_before, g.created_at) end + said.judge as until
      from groups g, said where g.wanted and g.attempts < said.judge_rounds
), silent_group as (
    select g.window_id, g.policy, g.judged_at, withheld,
           case when withheld then 'its judge to pass a probe, or an operator''s release'
                else 'the broker to take its announcement' end as waits_for,
           g.judged_at + case when withheld then said.probe else interval '0' end + said.handover as until
      from said, groups g
     cross join lateral (select exists (
           select from looks l
            where (l.group_id, l.revision) = (g.group_id, g.revision)
              and not coalesce((select s.trusted from judge_standing s
                                 where (s.judge, s.model, s.endpoint) = (l.judge, l.model, coalesce(l.endpoint, s.endpoint))
                                 order by s.rubric = l.rubric desc, s.finished_at desc limit 1), false)) as withheld) t
     where g.judged_at is not null and g.announced_at is null
)
select 'window' as kind, 'window ' || w.window_id as what,
       case when now() < w.ended then 'its end and the grace after it'
            when now() < w.runs_end then 'runs that have not ended'
            when w.barrier_sequence is null then 'the recorder to read its barrier'
            else 'the recorder to store what lies before its barrier' end as waits_for,
       w.starts_at as since, greatest(w.ended, w.runs_end) + said.handover as until
  from open_window w, said
union all
select 'window', 'window ' || window_id, 'the broker to take its announcement', closed_at, closed_at + said.handover
  from windows, said where state = 'closed' and announced_at is null
union all
select 'settlement', 'window ' || w.window_id, 'the outcome tracker to take it up', w.announced_at,
       w.announced_at + said.handover
  from windows w, said
 where w.state = 'closed' and w.announced_at is not null
   and not exists (select from settlements s where s.window_id = w.window_id)
union all
select 'settlement', 'window ' || s.window_id,
       case when s.barrier_sequence is null then 'outcomes to come in, and pull sources to be read'
            else 'what its runs expect, and the outcomes before its barrier' end,
       s.wait_from, s.wait_from + said.settle + said.handover
  from settlements s, said where s.state = 'waiting'
union all
select 'settlement', 'window ' || window_id, 'the broker to take its announcement', settled_at, settled_at + said.handover
  from settlements, said where state = 'settled' and announced_at is null
union all
select 'correction', 'window ' || window_id, 'more facts about it, to be taken in together', touched_at,
       touched_at + said.correct + said.handover
  from corrections_due, said
union all
select 'judgment', 'window ' || w.window_id, 'the scorer to group its runs', s.announced_at,
       s.announced_at + said.judge
  from windows w join settlements s using (window_id), said
 where w.trajectories > 0 and s.revision = 1 and s.announced_at is not null
   and not exists (select from groups g where g.window_id = w.window_id)
union all
select 'judgment', policy || ' in window ' || window_id || ': ' || count(*) || case count(*) when 1 then ' group' else ' groups' end,
       waits_for, min(created_at), max(until)
  from waiting_group group by policy, window_id, waits_for
union all
select 'announcement', policy || ' in window ' || window_id || ': ' || count(*) || case count(*) when 1 then ' group' else ' groups' end,
       waits_for, min(judged_at), min(until)
  from silent_group group by policy, window_id, waits_for
union all
select 'probe', 'the judge ' || p.model, 'the planted cases to be judged', p.started_at, p.heard_at + said.handover
  from judge_probes p, said where p.state = 'running'
union all
select 'batch', b.batch_id || ' of ' || b.policy,
       case when b.lease_until > now() then 'the trainer that holds it' else 'a trainer that is free' end,
       b.created_at, greatest(b.lease_until, b.created_at) + said.handover
  from batches b, said where b.state = 'claimed'
union all
select 'trial', policy || ' ' || version, waits_for, since, until from undecided
union all
select 'trial', policy || ' ' || version, waits_for, since, until from untried
union all
select 'training', 'training of ' || policy, 'the verdict on ' || version, since, until
  from (select distinct on (policy) * from (
            select policy, version, since, until from undecided
            union all select policy, version, since, until from untried where version <> 'v0') u
         order by policy, until desc) gate
union all
select 'announcement', policy || ' ' || version, 'the broker to take its announcement', decided_at, decided_at + said.handover
  from deployments, said where decided_at is not null and announced_at is null;

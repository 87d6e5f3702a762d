-- scorer -----------------------------------------------------------------------------------------
alter table looks add column endpoint text;               -- who answered, without user and password; null: before 0006

create or replace view judgment_looks as
select s.group_id, s.revision, s.look, s.hindsight, s.agent_id, s.trajectory_id, l.judge, l.model, l.rubric, s.place,
       s.score, s.rank, s.explanation, s.strengths, s.weaknesses, c.reply ->> 'text' as raw_reply, l.prompt_tokens,
       l.completion_tokens, l.cost_usd, l.latency_ms, l.remembered, l.hindsight_sha256, l.content_sha256, l.looked_at,
       l.endpoint
  from look_scores s
  join looks l using (group_id, revision, look, hindsight)
  left join judge_cache c using (content_sha256);

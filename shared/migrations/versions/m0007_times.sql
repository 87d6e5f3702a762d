-- Who says it: what the gateway saw, or what an agent tells of itself. What lay here before counts as told.
alter table bodies add column if not exists witnessed boolean not null default false;
alter table llm_calls add column if not exists witnessed boolean not null default false;

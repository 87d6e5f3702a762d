-- trainer ----------------------------------------------------------------------------------------
-- Each time that a batch was begun. Its lease stands with the batch; this is what became of it.
create table if not exists attempts (
    batch_id      text not null references batches,
    fencing_token bigint not null,                       -- counts every attempt
    number        integer not null,                      -- counts those that an orderly stop did not give back
    state         text not null default 'running' check (
                      state in ('running', 'trained', 'failed', 'retried', 'crashed', 'stopped', 'cancelled')),
    reason        text,
    trainer       text not null,                         -- host:pid of the service
    began_at      timestamptz not null default now(),
    heard_at      timestamptz,
    ended_at      timestamptz,
    progress      jsonb not null default '{}',           -- step, steps, and what was measured at that step
    primary key (batch_id, fencing_token),
    check ((state = 'running') = (ended_at is null))
);

alter table batches drop constraint if exists batches_state_check;
alter table batches add constraint batches_state_check
    check (state in ('claimed', 'trained', 'failed', 'empty', 'cancelled'));
alter table batches add column if not exists wandb_url text;

insert into attempts (batch_id, fencing_token, number, trainer)
select batch_id, fencing_token, attempts, 'unknown' from batches where state = 'claimed' and fencing_token > 0
on conflict do nothing;

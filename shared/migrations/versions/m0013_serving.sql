-- trainer: a version is an artifact, or an endpoint that somebody else runs --------------------------------
alter table models
    alter column artifact_sha256 drop not null,
    add column if not exists serving jsonb,              -- where it answers; null as the deployer's setting says
    add column if not exists adapter_of text;            -- sha256 of the artifact that it is an adapter over
alter table models drop constraint if exists models_answered;
alter table models add constraint models_answered check (artifact_sha256 is not null or serving is not null);
alter table models drop constraint if exists models_adapter_of;
alter table models add constraint models_adapter_of
    check (adapter_of ~ '^[0-9a-f]{64}$' and (adapter_of is null or artifact_sha256 is not null));

-- deployer ----------------------------------------------------------------------------------------------
alter table deployments
    add column if not exists mismatch double precision,  -- mean |trainer's - server's| log probability, nats a token
    add column if not exists verification text;          -- what was compared before it answered, or why not

-- admin ------------------------------------------------------------------------------------------
create table if not exists gateway_keys (                 -- what the broker's bucket of this name is a copy of
    key_sha256          text primary key check (key_sha256 ~ '^[0-9a-f]{64}$'),
    shown               text not null,                    -- its first characters, by which people tell keys apart
    agent_id            text not null,
    policies            text[],                           -- that it may ask; null: all
    expires_at          timestamptz,                      -- null: never
    requests_per_minute integer check (requests_per_minute > 0),
    tokens_per_day      bigint check (tokens_per_day > 0),
    concurrent          integer check (concurrent > 0),
    created_at          timestamptz not null default now(),
    revoked_at          timestamptz
);
create index if not exists gateway_keys_agent on gateway_keys (agent_id);

create table if not exists gateway_key_use (              -- as each gateway process tells it, from its own start on
    key_sha256 text not null references gateway_keys on delete cascade,
    day        date not null,                             -- in UTC
    gateway    text not null,
    requests   bigint not null,
    unrecorded bigint not null,                           -- calls that named no run
    tokens     bigint not null,
    told_at    timestamptz not null default now(),
    primary key (key_sha256, day, gateway)
);
create index if not exists gateway_key_use_day on gateway_key_use (day);

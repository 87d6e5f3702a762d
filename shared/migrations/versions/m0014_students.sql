-- trainer ----------------------------------------------------------------------------------------
create table if not exists students (                     -- what is trained where the best version is an endpoint
    policy          text primary key,
    artifact_sha256 text not null references artifacts,
    adapter_of      text references artifacts,            -- of an adapter: the artifact of its base
    note            text,
    created_at      timestamptz not null default now()
);
-- Of a batch whose parent has no weights here: the student that it was trained from.
alter table batches add column if not exists student_sha256 text references artifacts;

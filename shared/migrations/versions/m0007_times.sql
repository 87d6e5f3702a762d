alter table bodies add column if not exists witnessed boolean not null default false;

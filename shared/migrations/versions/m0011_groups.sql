-- Why a member is last in its group and no judge is asked about it; null where one is, as for all that lay here before.
alter table group_members add column if not exists ranks_last text;

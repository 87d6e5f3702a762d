-- deployer ---------------------------------------------------------------------------------------
-- held: what it was trained from has fallen; it is not tried, and answers only where an operator deploys it.
alter table deployments drop constraint if exists deployments_state_check;
alter table deployments add constraint deployments_state_check
    check (state in ('verifying', 'canary', 'promoted', 'superseded', 'rolled_back', 'refused', 'held'));

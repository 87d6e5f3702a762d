"""The loop: recorder, outcome_tracker, scorer, trainer, deployer, gateway, inference, admin."""

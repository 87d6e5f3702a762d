"""What trains: one file for each engine, behind the Protocol in services/trainer/training.py."""

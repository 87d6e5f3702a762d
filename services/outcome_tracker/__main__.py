from services.outcome_tracker.app import run

run()

from services.outcome_tracker.app import run

if __name__ == "__main__":
    run()

from services.scorer.app import run

if __name__ == "__main__":
    run()

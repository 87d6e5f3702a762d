from services.scorer.app import run

run()

from services.recorder.app import run

run()

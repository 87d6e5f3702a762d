from services.deployer.app import run

run()

from services.deployer.app import run

if __name__ == "__main__":
    run()

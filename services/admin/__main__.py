from services.admin.app import run

if __name__ == "__main__":
    run()

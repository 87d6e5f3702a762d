from services.admin.app import run

run()

"""What a training by ART imports, imported ahead of it. Where ART is not installed, the first batch says so."""

import importlib

for module in ("art", "services.trainer.engines.engine_art"):
    importlib.import_module(module)

"""What a training of the torch engine imports, imported ahead of it: each process that is forked has all of it.

Nothing is computed here: a fork has none of the threads that a computation leaves behind, and CUDA survives none.
"""

import importlib

for module in (
    "torch._dynamo",  # the optimizer's first step would import it
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "services.trainer.engines.engine_torch",
    "services.trainer.learning.kept",
    "services.trainer.learning.loop",
):
    importlib.import_module(module)

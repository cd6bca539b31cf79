"""What every rank of a gang brings along, brought along once: ranks are forked from a process that has imported this.

Seconds of each rank otherwise. Nothing here may start a thread or compute anything.
"""

import os

# As `parallel` has it, before DeepSpeed looks for itself.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pipeline.dictionary.trainer  # noqa: F401
import tests.support.gangs  # noqa: F401
from pipeline.dictionary.parallel import absent

with absent("mlflow"):
    import deepspeed  # noqa: F401

"""Classes with the names, arguments and results of other projects', on the ops of this one."""

from hitsr_fast.compat.accelerate import accelerate, undo
from hitsr_fast.compat.var import VectorQuantizer2

__all__ = ["VectorQuantizer2", "accelerate", "undo"]

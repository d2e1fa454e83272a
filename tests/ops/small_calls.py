"""Every op on every backend of a GPU, once on small arguments: `python -m tests.ops.small_calls`.

For compute-sanitizer, under which larger calls take minutes. It sees writes beyond a tensor only where each
tensor is an allocation of its own: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from hitsr_fast.dispatch import operations, use_backend
from tests.ops.test_contract import EXAMPLES, calls

BACKENDS = ("cuda", "triton")


def placed(value: Any, device: str) -> Any:
    """An argument, with its tensors on a device."""
    if isinstance(value, (list, tuple)):
        return type(value)(placed(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def run(device: str = "cuda", backends: tuple[str, ...] = BACKENDS) -> int:
    """Makes the calls and returns how many there were."""
    made = 0
    for name in EXAMPLES:
        operation = operations()[name]
        for backend in backends:
            for arguments in (*calls(name), *calls(name, large=True)):
                given = [placed(value, device) for value in arguments]
                # What is packed for a CPU is packed anew.
                given = ["" if isinstance(value, str) and ":" in value else value for value in given]
                if operation.reasons(*given)[backend] is None:
                    with use_backend(backend):
                        operation.run(*given)
                    made += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made


if __name__ == "__main__":
    count = run()
    print(f"{count} calls")
    sys.exit(0 if count else 1)

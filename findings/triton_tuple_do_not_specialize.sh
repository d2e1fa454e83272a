#!/usr/bin/env bash
# Triton: `do_not_specialize` stops at a tuple.
#
# Guess: a kernel argument that is listed in `do_not_specialize` is not specialised, whether it is an integer or a
# tuple of integers (strides, sizes), so that one compilation serves all of its values.
# Found (2026-11-30, triton 3.8.0 and 3.6.0): an integer is left alone, but each integer inside a tuple of that name
# is still made a constant where it is 1 and marked where 16 divides it. A kernel that takes its sizes as a tuple is
# compiled anew for 1, for multiples of 16 and for the rest, whatever `do_not_specialize` says.
#
# Needs no GPU: a driver that only names a chip, and Triton's own hook on what it compiles.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install "triton==${TRITON:-3.8.0}"
cat > "$folder/kernel.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor


class NamedChip:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(NamedChip())


@triton.jit(do_not_specialize=["size"])
def plain(out, size):
    tl.store(out, size)


@triton.jit(do_not_specialize=["sizes"])
def in_a_tuple(out, sizes):
    tl.store(out, sizes[0])


def compiled(kernel, values):
    """How many compilations the values of the last argument take."""
    return len({kernel.warmup(MockTensor(tl.int32), value, grid=(1,)).hash for value in values})


integers = compiled(plain, [1, 16, 5])
tuples = compiled(in_a_tuple, [(1,), (16,), (5,)])
print("triton", triton.__version__)
print("compilations for 1, 16, 5 as an integer:", integers)
print("compilations for 1, 16, 5 in a tuple:   ", tuples)
assert (integers, tuples) == (1, 3), "this has changed"
PY
cd "$folder" && ./venv/bin/python kernel.py

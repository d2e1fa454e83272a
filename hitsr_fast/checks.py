"""The one vocabulary of argument checks: an error names an argument, what was expected and what was found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, cuda
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX = (torch.int64,)
MAX_INT = 2**63 - 1  # of a schema's int

# Of each the usual type first: the abstract ones, which those of NumPy are, take longer.
INTEGER: tuple[type[Any], ...] = (int, torch.SymInt, Integral)
_NUMBER: tuple[type[Any], ...] = (float, int, torch.SymFloat, torch.SymInt, Real)


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype], like: Tensor | None = None) -> None:
    """Raise TypeError unless `value` is a tensor of these dtypes, ValueError unless it is where `like` is."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a {_any_of(dtypes)} tensor, found {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_any_of(dtypes)}, found {short_name(value.dtype)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, found {value.device}")


def check_dtype(name: str, value: object, dtypes: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless `value` is one of `dtypes`."""
    if value not in dtypes:
        found = short_name(value) if isinstance(value, torch.dtype) else repr(value)
        raise TypeError(f"{name}: expected {_any_of(dtypes)}, found {found}")


def check_shape(name: str, value: Tensor, letters: str, **known: int) -> None:
    """Raise ValueError unless `value` has the axes that `letters` names, those in `known` of that length."""
    axes, shape = letters.split(), value.shape
    if len(axes) == len(shape):  # a plain loop: a generator takes longer than all else here
        for axis, length in zip(axes, shape, strict=True):
            if known.get(axis, length) != length:
                break
        else:
            return
    expected = ", ".join(f"{axis}={known[axis]}" if axis in known else axis for axis in axes)
    raise ValueError(f"{name}: expected shape ({expected}), found {tuple(shape)}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")


def check_integer(name: str, value: object, low: int, high: int | None = None, limit: str = "") -> None:
    """Raise TypeError unless `value` is an integer, ValueError unless it is from `low` to `high`.

    limit: what `high` is, for the message. Symbolic integers of a trace are integers.
    """
    if not isinstance(value, INTEGER):
        raise TypeError(f"{name}: expected {_integers(low, high, limit)}, found {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {_integers(low, high, limit)}, found {value}")


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is finite and from `low` to `high`."""
    if not isinstance(value, _NUMBER):
        raise TypeError(f"{name}: expected {_numbers(low, high)}, found {value!r}")
    if not (low <= value <= high and -math.inf < value < math.inf):
        raise ValueError(f"{name}: expected {_numbers(low, high)}, found {value}")


def check_positive(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is finite and above 0."""
    if not isinstance(value, _NUMBER):
        raise TypeError(f"{name}: expected a finite number above 0, found {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, found {value}")


def check_generator(value: object) -> None:
    """Raise TypeError unless `value` is a random generator or None."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, found {value!r}")


def check_own_memory(name: str, value: Tensor) -> None:
    """Raise ValueError unless each element of `value`, which is to be written, has its own memory."""
    if value.is_contiguous():
        return
    sides = zip(value.shape, value.stride(), strict=True)
    if any(side > 1 and stride == 0 for side, stride in sides):
        raise ValueError(f"{name}: expected memory for each element, found an expanded tensor")


def check_apart(written: Mapping[str, Tensor], read: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError if a tensor that is to be written shares memory with another, of either kind.

    Asks for addresses, so it has no place in a trace. Two tensors of one storage whose addresses interleave
    count as apart only if they have the same strides.
    """
    tensors = (*written.values(), *(tensor for tensor in read.values() if tensor is not None))
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors):
        return
    spans = [(name, tensor, *_span(tensor)) for name, tensor in written.items()]
    others = [(name, tensor, *_span(tensor)) for name, tensor in read.items() if tensor is not None]
    for number, (name, one, begin, end) in enumerate(spans):
        for other_name, other, other_begin, other_end in (*spans[number + 1 :], *others):
            if begin < other_end and other_begin < end and _share_memory(one, other):
                raise ValueError(f"{name}: expected memory of its own, found some that {other_name} shares")


def check_image(name: str, image: Tensor) -> None:
    """Raise TypeError unless `image` is a floating-point tensor, ValueError unless it is `(B, 3, H, W)`."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(image).__name__}")
    if not image.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, found {image.dtype}")
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"{name}: expected shape (B, 3, H, W), found {tuple(image.shape)}")


def check_pair(a: Tensor, b: Tensor, *, min_side: int) -> None:
    """`check_image` of both; ValueError if shapes or devices differ, or a side is below `min_side`."""
    check_image("a", a)
    check_image("b", b)
    if a.shape != b.shape:
        raise ValueError(f"b: expected the shape of a, {tuple(a.shape)}, found {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"b: expected the device of a, {a.device}, found {b.device}")
    if min(a.shape[2:]) < min_side:
        raise ValueError(f"a: expected sides of at least {min_side} px, found {tuple(a.shape[2:])}")


def check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError if `value` holds NaN or infinity. Reads the tensor, so it has no place in a trace.

    Nothing can be read, and nothing is checked, while the kernels on `value` are captured as a CUDA graph.
    """
    if is_captured(value):
        return
    # Least and greatest are NaN where any value is; unlike isfinite() this takes no memory.
    if value.numel() > 0 and not torch.stack(value.aminmax()).isfinite().all():
        raise ValueError(f"{name}: expected finite values, found NaN or infinity")


def check_index_range(name: str, value: Tensor, size: int) -> None:
    """Raise ValueError if an index is outside [0, size). CPU only: elsewhere a look stalls the device."""
    if value.device.type != "cpu" or value.numel() == 0:
        return
    low, high = map(int, value.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected indices from 0 to {size - 1}, found {low} to {high}")


def has_values(*tensors: Tensor) -> bool:
    """Whether these tensors may be looked into.

    Not while a compiler or a fake tensor mode traces, nor while kernels on one of them become part of a CUDA
    graph.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() == 0:  # the usual case, which must not take long
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return False
    elif detect_fake_mode(tensors) is not None:
        return False
    return not any(map(is_captured, tensors))


def is_captured(tensor: Tensor) -> bool:
    """Whether kernels on this tensor become part of a CUDA graph, and nothing can be read back."""
    guard = cuda.device_of(tensor)
    if guard.idx < 0:
        return False
    with guard:
        return cuda.is_current_stream_capturing()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Address of the first element and of what follows the last; both 0 where there is none."""
    if tensor.numel() == 0:
        return 0, 0
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return begin, begin + tensor.element_size() * (1 + sum((side - 1) * stride for side, stride in steps))


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans meet have an element in common."""
    size, distance = one.element_size(), other.data_ptr() - one.data_ptr()
    layout = (one.dtype, one.shape, one.stride())
    if layout != (other.dtype, other.shape, other.stride()) or distance % size != 0:
        return True
    axes = [(stride, side) for stride, side in zip(one.stride(), one.shape, strict=True) if side > 1]
    return _meet(distance // size, sorted(axes, reverse=True))


def _meet(distance: int, axes: Sequence[tuple[int, int]]) -> bool:
    """Whether two tensors, so many elements apart, have one in common.

    axes: stride and length of each, the same for both; each stride reaches past all axes that follow, so that
    only two multiples of it come near enough for these.
    """
    if not axes:
        return distance == 0
    (stride, length), *rest = axes
    near = distance // stride
    return any(abs(i) < length and _meet(distance - i * stride, rest) for i in (near, near + 1))


def _integers(low: int, high: int | None, limit: str) -> str:
    if high is None:
        return f"an integer of at least {low}"
    return f"an integer from {low} to {limit} = {high}" if limit else f"an integer from {low} to {high}"


def _numbers(low: float, high: float) -> str:
    if high < math.inf:
        return f"a number from {low} to {high}"
    return "a finite number" if low == -math.inf else f"a finite number of at least {low}"


def _any_of(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(short_name(dtype) for dtype in dtypes)


def short_name(dtype: torch.dtype) -> str:
    """Name of a dtype as messages have it."""
    return str(dtype).removeprefix("torch.")

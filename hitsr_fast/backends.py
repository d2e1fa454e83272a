"""What runs an op: compiled C++ or CUDA, Triton, FlashAttention, PyTorch; each says itself why it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch

from hitsr_fast import env, extension
from hitsr_fast.checks import FLOATING, check_choice, short_name
from hitsr_fast.precision import exact_float32

NAMES = ("cuda", "triton", "flash_attn", "cpu", "reference")  # in order of priority
UP_TO_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32)
MAX_GRID = 65535  # of the second and third axis of a grid

_forced_set: ContextVar[str | None] = ContextVar("hitsr_fast_forced_instruction_set", default=None)


class Limit(NamedTuple):
    """The longest side that a backend takes."""

    letter: str
    axis: int
    most: int
    argument: str | None = None  # whose side, if not the first one's


class Backend:
    """One implementation of an op.

    Args:
        run: the implementation; takes the arguments of the op's schema, by position.
        dtypes: floating ones that it takes, of tensors and of results that are asked for.
        any_dtype: names of arguments that may have others, too.
        limits: the longest sides that it takes.
        unless: of the op's arguments, another reason why it cannot run the call, or None.
        rather: of the op's arguments, whether a later backend is quicker, if it can run the call on the
            device as well.
    """

    name: ClassVar[str]

    def __init__(
        self,
        run: Callable[..., Any],
        *,
        dtypes: Sequence[torch.dtype] = FLOATING,
        any_dtype: Sequence[str] = (),
        limits: Sequence[Limit] = (),
        unless: Callable[..., str | None] | None = None,
        rather: Callable[..., bool] | None = None,
    ) -> None:
        self.rather = rather
        self.run, self.dtypes, self.any_dtype, self.limits = run, dtypes, any_dtype, limits
        self._unless = unless
        self._refused = frozenset(FLOATING) - frozenset(dtypes)

    def bind(self, names: Sequence[str], tensors: Sequence[int], dtypes: Sequence[int]) -> None:
        """Learn the schema: names of all arguments, places of those that may be tensors, and of dtypes."""
        self._names, self._places, self._first = names, tensors, tensors[0]
        self._tensors = tuple(i for i in tensors if names[i] not in self.any_dtype)
        self._dtypes = tuple(dtypes)
        self._sides = [
            (names.index(limit.argument) if limit.argument else self._first, limit) for limit in self.limits
        ]

    def available(self) -> str | None:
        """Why nothing can run on this machine (no GPU, extension not built), or None."""
        return None

    def reason(self, *args: Any) -> str | None:
        """Why the call cannot run, or None."""
        return self.available() or self.refusal(args)

    def refusal(self, args: Sequence[Any]) -> str | None:
        """Why it cannot run with such arguments, or None."""
        for place in self._places:
            if args[place] is not None and (wanted := self._misplaced(args[place])) is not None:
                return f"needs {wanted} tensors, found {self._names[place]} on {args[place].device.type}"
        if self._refused:
            for place in self._tensors:
                if args[place] is not None and args[place].dtype in self._refused:
                    return self._refuses(place, args[place].dtype)
            for place in self._dtypes:
                if args[place] in self._refused:
                    return self._refuses(place, args[place])
        for place, limit in self._sides:
            side = args[place].shape[limit.axis]
            if side > limit.most:
                return f"needs {limit.letter} of at most {limit.most}, found {side}"
        return None if self._unless is None else self._unless(*args)

    def _misplaced(self, tensor: torch.Tensor) -> str | None:
        """What device a tensor should be on and is not, in words, or None."""
        return None

    def _refuses(self, place: int, dtype: torch.dtype) -> str:
        *most, last = map(short_name, self.dtypes)
        known = f"{', '.join(most)} or {last}" if most else last
        return f"needs {known}, found {self._names[place]} of {short_name(dtype)}"


class Reference(Backend):
    """The definition, in plain PyTorch, whose float32 is never TF32 (which cuDNN's is by default)."""

    name = "reference"

    def __init__(self, run: Callable[..., Any], **options: Any) -> None:
        self._definition = run
        super().__init__(self._exactly, **options)

    def _exactly(self, *args: Any) -> Any:
        with exact_float32():
            return self._definition(*args)


class Native(Backend):
    """C++ on the CPU: a private op of hitsr_fast._C, on the active instruction set.

    Args:
        kernel: name of the private op, which takes the op's arguments and then the instruction set.
        otherwise: what runs in its place where it has no code, for lack of the extension or for the dtype of
            the first tensor.
        run: what to call instead of the private op, if its arguments are others.
        options: see `Backend`.
    """

    name = "cpu"

    def __init__(
        self,
        kernel: str,
        *,
        otherwise: Callable[..., Any] | None = None,
        run: Callable[..., Any] | None = None,
        dtypes: Sequence[torch.dtype] = FLOATING,
        **options: Any,
    ) -> None:
        self.kernel, self._otherwise, self._compiled_dtypes = kernel, otherwise, dtypes
        run = run or functools.partial(native, kernel)
        if otherwise is not None:
            self._compiled, run, dtypes = run, self._either, FLOATING
        super().__init__(run, dtypes=dtypes, **options)

    def available(self) -> str | None:
        return None if self._otherwise is not None else extension.unavailable()

    def _misplaced(self, tensor: torch.Tensor) -> str | None:
        return None if tensor.is_cpu else "CPU"

    def _either(self, *args: Any) -> Any:
        assert self._otherwise is not None
        if args[self._first].dtype not in self._compiled_dtypes:
            return self._otherwise(*args)
        # A forced instruction set that the extension does not bring must raise.
        if extension.unavailable() is not None and forced_instruction_set() is None:
            extension.warn_once()
            return self._otherwise(*args)
        return self._compiled(*args)


class NativeCuda(Backend):
    """CUDA C++: what hitsr_fast._C_cuda registers; see `Backend` for the arguments."""

    name = "cuda"

    def available(self) -> str | None:
        reason = extension.unavailable("_C_cuda")
        return "no CUDA device" if reason is None and not torch.cuda.is_available() else reason

    def refusal(self, args: Sequence[Any]) -> str | None:
        return super().refusal(args) or _unloadable(args[self._first].device.index)

    def _misplaced(self, tensor: torch.Tensor) -> str | None:
        return None if tensor.is_cuda else "CUDA"


class Launch(Backend):
    """Triton kernels: `run` launches them, on the device of the first tensor; see `Backend`."""

    name = "triton"

    def __init__(self, run: Callable[..., Any], *, dtypes: Any = UP_TO_FLOAT32, **options: Any) -> None:
        self._launch = run
        super().__init__(self._on_device, dtypes=dtypes, **options)

    def available(self) -> str | None:
        return triton_unavailable()

    def _misplaced(self, tensor: torch.Tensor) -> str | None:
        return None if tensor.is_cuda or env.triton_interpret() else "CUDA or HIP"

    def _on_device(self, *args: Any) -> Any:
        with torch.cuda.device_of(args[self._first]):
            return self._launch(*args)


class FlashVersion(NamedTuple):
    """A version of FlashAttention."""

    number: int  # 2, 3 or 4
    module: str  # where its functions are
    capabilities: range  # first digits of the compute capabilities that it has code for
    head_dim: int  # the longest that it takes

    def load(self) -> ModuleType:
        """Its module; the first time this may take seconds."""
        return importlib.import_module(self.module)

    def unable(self, capability: int, head_dim: int) -> str | None:
        """Why it cannot run on such a device with such heads, or None."""
        if capability not in self.capabilities:
            first, last = self.capabilities[0], self.capabilities[-1]
            wanted = f"{first}" if first == last else f"{first} to {last}"
            return f"needs compute capability {wanted}, found {capability}"
        if head_dim > self.head_dim:
            return f"needs D of at most {self.head_dim}, found {head_dim}"
        try:
            self.load()
        except ImportError as error:
            return str(error)
        return None


FLASH_VERSIONS = (
    FlashVersion(4, "flash_attn.cute.interface", range(9, 12), 128),
    FlashVersion(3, "flash_attn_interface", range(9, 10), 256),
    FlashVersion(2, "flash_attn.flash_attn_interface", range(8, 13), 256),
)


class Flash(Backend):
    """FlashAttention: of its versions the newest that can run, which `run` takes first; see `Backend`."""

    name = "flash_attn"

    def __init__(self, run: Callable[..., Any], **options: Any) -> None:
        self._call = run
        super().__init__(self._newest, dtypes=(torch.float16, torch.bfloat16), **options)

    def available(self) -> str | None:
        return self._unable(None, 0)

    def reason(self, *args: Any) -> str | None:
        # FlashAttention is imported last, and only for calls that it may run.
        values = args[self._first]
        return self.refusal(args) or self._unable(values.device, values.shape[-1])

    def _misplaced(self, tensor: torch.Tensor) -> str | None:
        return None if tensor.is_cuda else "CUDA"

    def _unable(self, device: torch.device | None, head_dim: int) -> str | None:
        if torch.version.hip is not None or not torch.cuda.is_available():
            return "no CUDA device"
        reasons = _flash_reasons(torch.cuda.get_device_capability(device)[0], head_dim)
        if None in reasons.values():
            return None
        return "; ".join(f"FlashAttention {version.number}: {why}" for version, why in reasons.items())

    def _newest(self, *args: Any) -> Any:
        values = args[self._first]
        reasons = _flash_reasons(torch.cuda.get_device_capability(values.device)[0], values.shape[-1])
        return self._call(next(version for version, why in reasons.items() if why is None), *args)


@functools.cache
def _flash_reasons(capability: int, head_dim: int) -> dict[FlashVersion, str | None]:
    """Of each version, newest first, why it cannot run, or None."""
    return {version: version.unable(capability, head_dim) for version in FLASH_VERSIONS}


def native(kernel: str, *args: Any) -> Any:
    """Call a private op of hitsr_fast._C on the active instruction set."""
    instruction_set = active_instruction_set()  # or the reason why there is none
    return _overload(kernel)(*args, instruction_set)


@functools.cache
def _overload(kernel: str) -> Any:
    return getattr(torch.ops.hitsr_fast, kernel).default


@functools.cache
def _unloadable(device: int) -> str | None:
    """Why hitsr_fast._C_cuda has no code for a device, or None: its chip is not among the targets, and its
    driver is older than the compiler, whose PTX it cannot take."""
    error = torch.ops.hitsr_fast._cuda_unloadable(device)
    if not error:
        return None
    info = extension.build_info("_C_cuda")
    major, minor = torch.cuda.get_device_capability(device)
    built = f"found {major}.{minor}, with CUDA {info['cuda']} for {info['targets']}"
    return f"needs code that the device's driver takes, {built}: {error}"


@functools.cache
def triton_unavailable() -> str | None:
    """Why Triton cannot run here, or None; asked once, as Triton asks for its interpreter once."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not env.triton_interpret() and not torch.cuda.is_available():
        return "no CUDA or HIP device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def cdiv(count: int, size: int) -> int:
    """How many blocks of a size hold a count."""
    return -(-count // size)


def instruction_sets() -> tuple[str, ...]:
    """Those that the extension has code for and this machine can run, quickest first.

    Raises:
        RuntimeError: the extension is unavailable; the message says why.

    Example:
        >>> from hitsr_fast import extension
        >>> extension.unavailable() is not None or instruction_sets()[-1] == "portable"
        True
    """
    reason = extension.unavailable()
    if reason is not None:
        raise RuntimeError(f"hitsr_fast._C: {reason}")
    return _known_sets()


@functools.cache
def _known_sets() -> tuple[str, ...]:
    return tuple(torch.ops.hitsr_fast._instruction_sets())


def kernel_sets() -> dict[str, tuple[str, ...]]:
    """The instruction sets that each file of C++ kernels has code for, by its name, the highest first.

    Another set than these takes the next lower one.

    Raises:
        RuntimeError: the extension is unavailable; the message says why.
    """
    instruction_sets()
    rows = (row.split(": ") for row in torch.ops.hitsr_fast._kernel_sets())
    return {name: tuple(sets.split(", ")) for name, sets in sorted(rows)}


def forced_in_context() -> str | None:
    """The instruction set that `use_instruction_set` forces here, or None."""
    return _forced_set.get()


def forced_instruction_set() -> str | None:
    """That which `use_instruction_set`, or else `HITSR_FAST_CPU_ISA`, asks for; None is the quickest."""
    return _forced_set.get() or env.cpu_isa()


def active_instruction_set() -> str:
    """The instruction set that the CPU backends use: the forced one, or the quickest.

    Raises:
        RuntimeError: the extension is unavailable; the message says why.
        ValueError: `HITSR_FAST_CPU_ISA` names one that this machine does not have.
    """
    forced = forced_instruction_set()
    if forced is None:
        return _quickest_set()
    check_choice("HITSR_FAST_CPU_ISA", forced, instruction_sets())
    return forced


@functools.cache
def _quickest_set() -> str:
    return instruction_sets()[0]


@contextmanager
def use_instruction_set(name: str | None) -> Iterator[None]:
    """Force an instruction set for the CPU backends in this context; None lifts an outer choice.

    Args:
        name: one of `instruction_sets()`. An op that has no code for it takes the next lower one.

    Raises:
        RuntimeError: the extension is unavailable; the message says why.
        ValueError: this machine does not have it.

    Notes:
        Takes precedence over `HITSR_FAST_CPU_ISA`.
    """
    if name is not None:
        check_choice("name", name, instruction_sets())
    token = _forced_set.set(name)
    try:
        yield
    finally:
        _forced_set.reset(token)

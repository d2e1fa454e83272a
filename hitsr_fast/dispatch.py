"""Which implementation of an op runs: the choice is explicit, and it never falls back in silence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from hitsr_fast import env, extension
from hitsr_fast.backends import (
    NAMES,
    Backend,
    Reference,
    forced_in_context,
    kernel_sets,
    use_instruction_set,
)
from hitsr_fast.checks import check_choice, short_name

_LIBRARY = torch.library.Library("hitsr_fast", "DEF")
_OPS: dict[str, Op] = {}  # filled once, as hitsr_fast.ops is imported
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_NUMBERS = frozenset({float, int, bool})
_forced: ContextVar[str | None] = ContextVar("hitsr_fast_forced_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """The forced backend (or every backend) cannot run this call; the message holds each one's reason."""


class Gradient(NamedTuple):
    """How an op is differentiated: in reverse mode, once."""

    save: Callable[[Any, tuple[Any, ...], Any], None]  # given the context, the arguments and the result
    formula: Callable[..., Any]  # gradients of the arguments, given the context and those of the results


class Op:
    """An op of this package and its backends, in order of priority; calling it runs the chosen one."""

    def __init__(
        self,
        schema: str,
        backends: dict[str, Backend | None],
        check: Callable[..., None] | None,
        gradient: Gradient | None,
        integer: bool,
    ) -> None:
        parsed = torch._C.parse_schema(schema)
        arguments = parsed.arguments
        self.name = parsed.name
        self.backends = {name: backend for name in NAMES if (backend := backends[name]) is not None}
        self._check, self._gradient, self._integer = check, gradient, integer
        # A backward op is met in a graph of its own only where second derivatives are asked for.
        self._refuses = gradient is None and not integer and not self.name.endswith("_backward")
        self._tensors = [i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]
        self._numbers = [i for i, a in enumerate(arguments) if str(a.real_type) in ("float", "int", "bool")]
        self._written = [i for i in self._tensors if (a := arguments[i].alias_info) and a.is_write]
        for backend in self.backends.values():
            backend.bind(
                [argument.name for argument in arguments],
                self._tensors,
                [i for i, argument in enumerate(arguments) if str(argument.real_type) == "ScalarType"],
            )

    def __call__(self, *args: Any) -> Any:
        """Run the op; `torch.ops.hitsr_fast.<op>` is asked where PyTorch has to know of the call.

        Raises:
            RuntimeError: an argument asks for a gradient, and the op has none.
        """
        if self._refuses and torch.is_grad_enabled():
            for place in self._tensors:
                if args[place] is not None and args[place].requires_grad:
                    raise RuntimeError(f"{self.name}: has no gradient; call it under torch.no_grad()")
        if not torch.compiler.is_compiling() and self._unseen(args):
            return self.run(*args)
        return self._overload(*args)

    def run(self, *args: Any) -> Any:
        """Check values, choose a backend, run it; below autograd and all tracing."""
        if self._check is not None:
            self._check(*args)
        backend = self.choose(*args)
        device = "cpu" if args[self._tensors[0]].is_cpu else args[self._tensors[0]].device.type
        if torch.is_autocast_enabled(device):
            # An op computes in the dtypes that it is given: autocast must not reach the calls inside it.
            with torch.autocast(device, enabled=False):
                result = backend.run(*args)
        else:
            result = backend.run(*args)
        # A kernel writes to memory behind PyTorch's back: autograd must learn of it.
        for place in self._written:
            if not args[place].is_inference():
                torch.autograd.graph.increment_version(args[place])
        return result

    def _unseen(self, args: Sequence[Any]) -> bool:
        """Whether nothing traces, differentiates or transforms the call: 10 us of PyTorch's are spared."""
        if (
            torch._C._len_torch_dispatch_stack() > 0
            or torch._C._len_torch_function_stack() > 0
            or torch._C._functorch.maybe_current_level() is not None
            or forward_ad._current_level >= 0
            or torch._C._autograd._profiler_enabled()
        ):
            return False
        for place in self._numbers:  # NumPy's, which PyTorch turns into Python's
            if type(args[place]) not in _NUMBERS:
                return False
        differentiates = not self._integer and torch.is_grad_enabled()
        for place in self._tensors:
            tensor = args[place]
            if tensor is not None and (
                type(tensor) not in _PLAIN
                or tensor.is_meta
                or tensor.is_neg()
                or (differentiates and tensor.requires_grad)
            ):
                return False
        return True

    def reasons(self, *args: Any) -> dict[str, str | None]:
        """Of each backend in order of priority, why it cannot run this call, or None where it can.

        Without arguments the reasons are those of the machine alone.
        """
        table: dict[str, str | None] = dict.fromkeys(NAMES, "not implemented for this op")
        for name, backend in self.backends.items():
            table[name] = backend.reason(*args) if args else backend.available()
        return table

    def choose(self, *args: Any) -> Backend:
        """The forced backend, or the first that can run.

        Raises:
            BackendUnavailableError: the forced one cannot run this call, or none can.
        """
        forced = forced_backend()
        found = self.preferred(*args) if forced is None else self.backends.get(forced)
        if found is not None and (forced is None or found.reason(*args) is None):
            return found
        wanted = "no backend can" if forced is None else f"forced backend {forced!r} cannot"
        raise BackendUnavailableError(f"{self.name}: {wanted} run this call\n{_table(self.reasons(*args))}")

    def preferred(self, *args: Any) -> Backend | None:
        """The first backend that can run, or the next such one where the first says that it is quicker."""
        first: Backend | None = None
        for backend in self.backends.values():
            if backend.reason(*args) is not None:
                continue
            if backend.name == "reference":
                if first is None and "cpu" in self.backends:
                    self._warn(args)
                return first or backend
            if first is not None or backend.rather is None or not backend.rather(*args):
                return backend
            first = backend
        return first

    def _warn(self, args: Sequence[Any]) -> None:
        """Say once that the extension is missing, where it would have run the call."""
        native = self.backends["cpu"]
        if native.available() is not None and native.refusal(args) is None:
            extension.warn_once()

    def _register(self, schema: str, fake: Callable[..., Any]) -> None:
        """Declare the op to PyTorch."""

        def implementation(*args: Any) -> Any:
            # PyTorch would take a forward-mode derivative to be 0.
            if any(
                isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
            ):
                raise NotImplementedError(f"{self.name}: forward-mode derivatives are not implemented")
            return self.run(*args)

        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, implementation, "CompositeExplicitAutograd")
        qualified = f"hitsr_fast::{self.name}"
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
        self._overload = getattr(torch.ops.hitsr_fast, self.name).default
        if self._gradient is not None:
            save, formula = _remembering(self._gradient)
            torch.library.register_autograd(qualified, formula, setup_context=save, lib=_LIBRARY)
        elif (self._refuses and not self._written) or self.name.endswith("_backward"):
            torch.library.register_autograd(qualified, self._no_gradient, lib=_LIBRARY)

    def _no_gradient(self, ctx: Any, *grads: Any) -> Any:
        """PyTorch alone would only warn."""
        what = "second derivatives are" if self.name.endswith("_backward") else "a gradient is"
        raise NotImplementedError(f"{self.name}: {what} not implemented")


def op(
    schema: str,
    *,
    reference: Callable[..., Any],
    cuda: Backend | None = None,
    triton: Backend | None = None,
    flash_attn: Backend | None = None,
    native: Backend | None = None,
    check: Callable[..., None] | None = None,
    gradient: Gradient | None = None,
    integer: bool = False,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op; decorates its fake, which gives shapes and dtypes of the results from fake arguments.

    Args:
        schema: without defaults: PyTorch leaves out arguments that equal their default. The first argument is
            a tensor; what is written in place is marked, as in `Tensor(a!)`.
        reference: the definition.
        cuda, triton, flash_attn, native: what else runs it, native being C++ on the CPU.
        check: raises on bad values (shapes are the public function's job). It runs with each real call and
            never while tracing, so it may look into tensors, but for those with `checks.is_captured`.
        gradient: its formula, whose backward op is called `<op>_backward`. Without one, arguments that ask
            for a gradient are an error.
        integer: whether all results are integers, so that there is nothing to differentiate.
    """

    def declare(fake: Callable[..., Any]) -> Op:
        found = {"cuda": cuda, "triton": triton, "flash_attn": flash_attn, "cpu": native}
        declared = Op(schema, found | {"reference": Reference(reference)}, check, gradient, integer)
        declared._register(schema, fake)
        _OPS[declared.name] = declared
        return declared

    return declare


def _remembering(gradient: Gradient) -> Gradient:
    """The same, run under what was forced for the forward: autograd's threads have contexts of their own."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.forced = _forced.get(), forced_in_context()
        gradient.save(ctx, inputs, output)

    def formula(ctx: Any, *grads: Any) -> Any:
        backend, instruction_set = ctx.forced
        with use_backend(backend), use_instruction_set(instruction_set):
            return gradient.formula(ctx, *grads)

    return Gradient(save, formula)


def forced_backend() -> str | None:
    """The backend that `use_backend`, or else `HITSR_FAST_BACKEND`, asks for; None leaves the choice open.

    Raises:
        ValueError: `HITSR_FAST_BACKEND` names no backend.
    """
    forced = _forced.get()
    if forced is None and (forced := env.backend()) is not None:
        check_choice("HITSR_FAST_BACKEND", forced, NAMES)
    return forced


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op called in this context; None lifts an outer choice.

    Args:
        name: "cuda", "triton", "flash_attn", "cpu" or "reference".

    Raises:
        ValueError: no such backend.

    Notes:
        An op that the backend cannot run raises `BackendUnavailableError`.
        Takes precedence over `HITSR_FAST_BACKEND`.

    Example:
        >>> import torch
        >>> from hitsr_fast.ops import nearest_code
        >>> with use_backend("reference"):
        ...     nearest_code(torch.tensor([[0.9]]), torch.tensor([[0.0], [1.0]]))
        tensor([1])
    """
    if name is not None:
        check_choice("name", name, NAMES)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def operations() -> dict[str, Op]:
    """Every op by name; imports them."""
    importlib.import_module("hitsr_fast.ops")
    return dict(_OPS)


def explain(op: str, *args: Any) -> None:
    """Print, for each backend of an op, whether it can run and why not, and which one would be taken.

    Args:
        op: name, as in `torch.ops.hitsr_fast.<op>`.
        args: the arguments of that op, to ask about one call; without them the machine is asked.

    Raises:
        ValueError: no such op.

    Example:
        >>> with use_backend("reference"):
        ...     explain("group_norm_silu")  # doctest: +ELLIPSIS
        cuda        not implemented for this op
        triton      ...
        flash_attn  not implemented for this op
        cpu         ...
        reference   can run  <- chosen
    """
    table = operations()
    check_choice("op", op, sorted(table))
    reasons = table[op].reasons(*args)
    forced = forced_backend()
    able = [name for name, reason in reasons.items() if reason is None and forced in (None, name)]
    chosen = able[0] if able else None
    if args and forced is None and (preferred := table[op].preferred(*args)) is not None:
        chosen = preferred.name
    print(_table(reasons, chosen=chosen))


def support_tables() -> tuple[str, str]:
    """Markdown of what is supported, as the backends say themselves; docs/architecture.md shows it.

    Returns:
        Of each op, the dtypes that each backend takes; of each file of C++ kernels, its instruction sets.

    Raises:
        RuntimeError: the extension, which knows its kernels, is unavailable.
    """
    short = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}

    def taken(backend: Backend | None) -> str:
        return "" if backend is None else " ".join(short[short_name(dtype)] for dtype in backend.dtypes)

    ops = [
        [f"`{name}`", *(taken(found.backends.get(backend)) for backend in NAMES)]
        for name, found in sorted(operations().items())
    ]
    kernels = [[f"`{name}`", ", ".join(sets)] for name, sets in kernel_sets().items()]
    return _markdown(["op", *NAMES], ops), _markdown(["kernels", "instruction sets"], kernels)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def _table(reasons: dict[str, str | None], chosen: str | None = None) -> str:
    width = max(len(name) for name in reasons)
    return "\n".join(
        f"{name:<{width}}  {reason or 'can run'}{'  <- chosen' if name == chosen else ''}"
        for name, reason in reasons.items()
    )

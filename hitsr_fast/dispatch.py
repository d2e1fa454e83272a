"""Which implementation of an op runs: the choice is explicit, and it never falls back in silence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from hitsr_fast import env

PRIORITY = ("cuda", "triton", "flash_attn", "cpu", "reference")

_NOT_IMPLEMENTED = "not implemented for this op"
_LIBRARY = torch.library.Library("hitsr_fast", "DEF")
_OPERATIONS: dict[str, Operation] = {}  # filled once, as hitsr_fast.ops is imported
_forced: ContextVar[str | None] = ContextVar("hitsr_fast_forced_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """The forced backend (or every backend) cannot run this call; the message holds each one's reason."""


def _always(*_args: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: one of `PRIORITY`.
        run: the implementation; takes the arguments of the op's schema, by position.
        supports: of the same arguments, why this call cannot run here, or None where it can.
        available: why nothing can run on this machine (no GPU, extension not built), or None.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None] = _always
    available: Callable[[], str | None] = lambda: None

    def __post_init__(self) -> None:
        if self.name not in PRIORITY:
            raise ValueError(f"name: expected one of {', '.join(PRIORITY)}, found {self.name!r}")

    def reason(self, *args: Any) -> str | None:
        """Why the call cannot run, or None."""
        return self.available() or self.supports(*args)


class Operation:
    """An op's backends, in order of priority; calling it runs the chosen one."""

    def __init__(self, name: str, backends: Sequence[Backend]) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}

    def reasons(self, *args: Any) -> dict[str, str | None]:
        """Of each backend in order of priority, why it cannot run this call, or None where it can.

        Without arguments the reasons are those of the machine alone.
        """
        table: dict[str, str | None] = {}
        for name in PRIORITY:
            backend = self.backends.get(name)
            if backend is None:
                table[name] = _NOT_IMPLEMENTED
            else:
                table[name] = backend.reason(*args) if args else backend.available()
        return table

    def choose(self, *args: Any) -> Backend:
        """The forced backend, or the first that can run.

        Raises:
            BackendUnavailableError: the forced one cannot run this call, or none can.
        """
        forced = forced_backend()
        for name in PRIORITY if forced is None else (forced,):
            backend = self.backends.get(name)
            if backend is not None and backend.reason(*args) is None:
                return backend
        wanted = "no backend" if forced is None else f"forced backend {forced!r}"
        verb = "can" if forced is None else "cannot"
        raise BackendUnavailableError(
            f"{self.name}: {wanted} {verb} run this call\n{_table(self.reasons(*args))}"
        )

    def __call__(self, *args: Any) -> Any:
        # An op computes in the dtypes that it is given: autocast must not reach the PyTorch calls inside it.
        device = "cpu"
        for arg in args:
            if isinstance(arg, torch.Tensor):
                device = arg.device.type
                break
        if any(map(_has_tangent, args)):
            raise NotImplementedError(f"{self.name}: forward-mode derivatives are not implemented")
        backend = self.choose(*args)
        if not torch.is_autocast_enabled(device):
            return backend.run(*args)
        with torch.autocast(device, enabled=False):
            return backend.run(*args)


def _has_tangent(arg: object) -> bool:
    """Whether a forward-mode derivative goes along with a tensor: PyTorch would take it to be 0."""
    return isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None


def register(
    schema: str,
    *,
    backends: Sequence[Backend],
    fake: Callable[..., Any],
    check: Callable[..., None] = _always,
) -> None:
    """Declare `torch.ops.hitsr_fast.<op>`.

    Args:
        schema: of the op, without defaults: PyTorch leaves out arguments that equal their default.
        backends: its implementations; must hold "reference".
        fake: shape and dtype of the results from fake arguments.
        check: raises on bad values (shapes are the public function's job). It runs with each real call and
            never while tracing, so it may look into tensors.
    """
    name = schema.partition("(")[0]
    operation = Operation(name, backends)
    _OPERATIONS[name] = operation
    changed = [place for place, argument in enumerate(schema.split(",")) if "!)" in argument]

    def call(*args: Any) -> Any:
        check(*args)
        result = operation(*args)
        # A kernel writes to memory behind PyTorch's back: autograd must learn of it.
        for place in changed:
            if not args[place].is_inference():
                torch.autograd.graph.increment_version(args[place])
        return result

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hitsr_fast::{name}", fake, lib=_LIBRARY)


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Give `torch.ops.hitsr_fast.<name>` a gradient, run under the backend that was forced for the forward.

    The autograd engine may use a thread of its own, which does not see `use_backend` of this one.
    """

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.forced_backend = _forced.get()
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Any) -> Any:
        token = _forced.set(ctx.forced_backend)
        try:
            return backward(ctx, *grads)
        finally:
            _forced.reset(token)

    torch.library.register_autograd(f"hitsr_fast::{name}", run, setup_context=remember, lib=_LIBRARY)


def register_no_gradient(name: str, reason: str) -> None:
    """Make a backward pass through `torch.ops.hitsr_fast.<name>` an error; PyTorch alone would only warn."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{name}: {reason}")

    torch.library.register_autograd(f"hitsr_fast::{name}", refuse, lib=_LIBRARY)


def forced_backend() -> str | None:
    """The backend that `use_backend`, or else `HITSR_FAST_BACKEND`, asks for; None leaves the choice open.

    Raises:
        ValueError: `HITSR_FAST_BACKEND` names no backend.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    forced = env.backend()
    if forced is not None and forced not in PRIORITY:
        raise ValueError(f"HITSR_FAST_BACKEND: expected one of {', '.join(PRIORITY)}, found {forced!r}")
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
    if name is not None and name not in PRIORITY:
        raise ValueError(f"name: expected one of {', '.join(PRIORITY)} or None, found {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def operations() -> dict[str, Operation]:
    """Every registered op by name; imports them."""
    importlib.import_module("hitsr_fast.ops")
    return dict(_OPERATIONS)


def explain(op: str, *args: Any) -> None:
    """Print, for each backend of an op, whether it can run and why not, and which one would be taken.

    Args:
        op: name, as in `torch.ops.hitsr_fast.<op>`.
        args: the arguments of that op, to ask about one call; without them the machine is asked.

    Raises:
        ValueError: no such op.

    Example:
        >>> explain("residual_decode_backward")
        cuda        not implemented for this op
        triton      not implemented for this op
        flash_attn  not implemented for this op
        cpu         not implemented for this op
        reference   can run  <- chosen
    """
    table = operations()
    if op not in table:
        raise ValueError(f"op: expected one of {', '.join(sorted(table))}, found {op!r}")
    reasons = table[op].reasons(*args)
    forced = forced_backend()
    able = [name for name, reason in reasons.items() if reason is None and forced in (None, name)]
    print(_table(reasons, chosen=able[0] if able else None))


def _table(reasons: dict[str, str | None], chosen: str | None = None) -> str:
    width = max(len(name) for name in reasons)
    return "\n".join(
        f"{name:<{width}}  {reason or 'can run'}{'  <- chosen' if name == chosen else ''}"
        for name, reason in reasons.items()
    )

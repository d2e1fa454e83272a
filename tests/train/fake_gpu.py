"""A GPU whose tensors have no values: what would make the host wait for it is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
DEVICE = "meta"  # fake tensors that say "cuda" have no backward where there is no driver


class HostWaitsError(AssertionError):
    """The host would wait until the device is idle."""


class FakeGpu(TorchDispatchMode):
    """PyTorch's "meta" stands for a GPU.

    To read a value of such a tensor, or a shape that depends on values, is an error of PyTorch's. Copies
    between CPU and device wait too, but for those that are marked not to; so does an index that lies on the
    CPU. `strict` off lets those pass, for what is made before the first step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strict, self._patch = True, pytest.MonkeyPatch()

    def __enter__(self) -> FakeGpu:
        super().__enter__()
        for place, name in ((torch, "tensor"), (Tensor, "new_tensor")):
            self._patch.setattr(place, name, self._of_numbers(getattr(place, name)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()
        super().__exit__(*error)

    def _of_numbers(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function that makes a tensor of numbers: to a GPU it copies them, and waits."""

        def checked(*args: Any, **options: Any) -> Tensor:
            made = make(*args, **options)
            if self.strict and made.is_meta:
                raise HostWaitsError(f"{make} of numbers on the device")
            return made

        return checked

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._pin_memory.default:  # which asks a driver
            return args[0].clone()
        if func is aten.is_pinned.default:
            return False
        if self.strict:
            self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if func is aten._to_copy.default:
            target = kwargs.get("device")
            devices |= {torch.device(target).type} if target is not None else set()
            waits = not kwargs.get("non_blocking")
        elif func is aten.copy_.default:
            waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
        else:
            devices = {tensor.device.type for tensor in tensors if tensor.dim() > 0}
            waits = True
        if waits and len(devices) > 1:
            raise HostWaitsError(f"{func} between {' and '.join(sorted(devices))}")


@contextlib.contextmanager
def no_autocast() -> Any:
    """It knows no such device; where it is off, as here, it does nothing anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
        yield


Wait = Callable[[Tensor], object]
WAITS: dict[str, Wait] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "bincount": lambda x: torch.bincount(x.long(), minlength=8),
    "unique": lambda x: x.unique(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.zeros(3).to(x.device),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "index": lambda x: x[torch.tensor([0, 1])],
    "copy": lambda x: x.copy_(torch.zeros(3)),
}

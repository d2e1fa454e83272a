"""No way of writing a codebook leaves a packed one behind: the GPU's rule, on two processes of the CPU.

Both processes run on Triton's interpreter, whose kernels pack as a GPU's do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hitsr_fast.dispatch import use_backend
from hitsr_fast.nn.quantizer import ResidualQuantizer
from hitsr_fast.ops import residual_quantize
from hitsr_fast.pyramid import ScalePyramid
from tests.ops.backends import forced

Write = Callable[[nn.Parameter], object]


class DataOptimizer(torch.optim.Optimizer):
    """One that writes to `.data`, as many do."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.data, alpha=-group["lr"])


def optimizer(kind: Callable[..., torch.optim.Optimizer], **options: object) -> Write:
    def step(codebook: nn.Parameter) -> None:
        codebook.grad = torch.randn(codebook.shape).mul_(3)
        kind([codebook], **options).step()

    return step


def broadcast(codebook: nn.Parameter) -> None:
    """What a rank has of its own is overwritten; so that it is on both, each has its turn."""
    for source in range(2):
        if dist.get_rank() == source:
            codebook.detach().numpy()[:] = torch.randn(codebook.shape).numpy()
        dist.broadcast(codebook.detach(), src=source)


WRITES: dict[str, Write] = {
    "SGD": optimizer(torch.optim.SGD, lr=1.0),
    "AdamW, a loop": optimizer(torch.optim.AdamW, lr=3.0, foreach=False),
    "AdamW, foreach": optimizer(torch.optim.AdamW, lr=3.0, foreach=True),
    "AdamW, fused": optimizer(torch.optim.AdamW, lr=3.0, fused=True),
    "one that writes to .data": optimizer(DataOptimizer, defaults={"lr": 1.0}),
    "no_grad": lambda codebook: codebook.detach().copy_(codebook.detach().roll(1, 0)),
    ".data": lambda codebook: codebook.data.mul_(-1),
    "all_reduce": lambda codebook: dist.all_reduce(codebook.detach()),
    "broadcast": broadcast,
    # A kernel of a replayed graph writes to memory, and tells nobody.
    "a replayed graph": lambda codebook: codebook.detach().numpy().__imul__(-1),
}
# That PyTorch's version counter does not see: with it and the address as the rule, indices would be stale.
UNSEEN = (
    *("AdamW, fused", "one that writes to .data", ".data"),
    *("all_reduce", "broadcast", "a replayed graph"),
)


def expected(z: Tensor, quantizer: ResidualQuantizer, codebook: Tensor) -> Tensor:
    """Indices by the definition, of a codebook that nobody has seen before."""
    bank = quantizer.bank()
    with use_backend("reference"):
        found = residual_quantize(
            *(z, codebook.detach().clone(), bank.phi_weight.detach(), bank.phi_bias.detach()),
            scales=quantizer.pyramid.scales,
            phi_index=bank.phi_index,
            phi_ratio=bank.phi_ratio,
        )
    return found.indices


def two_processes(check: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_child, (check, f"file://{folder / 'store'}"), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]


def _child(rank: int, check: Callable[[], None], store: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    importlib.import_module("hitsr_fast.nn.prepared").keeps = lambda codebook: False  # as off the CPU
    with forced("triton"):
        check()
    dist.destroy_process_group()


def make() -> tuple[ResidualQuantizer, Tensor]:
    return ResidualQuantizer(40, 4, ScalePyramid((1, 2, 4)), phi_ratio=0.0), 2 * torch.randn(1, 4, 4, 4)


def check_writes() -> None:
    quantizer, z = make()
    stale = quantizer.quantize(z).indices
    for name, write in WRITES.items():
        before = quantizer.codebook.data_ptr(), quantizer.codebook._version
        write(quantizer.codebook)
        seen = before != (quantizer.codebook.data_ptr(), quantizer.codebook._version)
        found = quantizer.quantize(z).indices
        fresh = expected(z, quantizer, quantizer.codebook)
        assert not torch.equal(fresh, stale), f"{name}: changes no index"
        assert torch.equal(found, fresh), name
        assert seen != (name in UNSEEN), f"{name}: {'seen' if seen else 'not seen'} by the version counter"
        stale = fresh


def check_fsdp() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    quantizer, z = make()
    fully_shard(quantizer, mesh=init_device_mesh("cpu", (2,)))
    step = torch.optim.SGD(quantizer.parameters(), lr=30.0)
    stale = None
    for _ in range(3):
        codebook = quantizer.codebook
        assert isinstance(codebook, DTensor) and codebook.to_local().shape == (20, 4)
        fresh = expected(z, make()[0], codebook.full_tensor())
        with use_backend(None):  # one that has a backward
            out = quantizer(z)
        assert torch.equal(out.indices, fresh)
        assert stale is None or not torch.equal(fresh, stale)
        stale = fresh
        out.loss.backward()
        step.step()
        step.zero_grad()


def test_every_way_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_processes(check_writes, tmp_path, monkeypatch)


@pytest.mark.slow
def test_fsdp2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_processes(check_fsdp, tmp_path, monkeypatch)

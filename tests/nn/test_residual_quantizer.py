"""`ResidualQuantizer` against VAR's quantizer in eager PyTorch, in float64: equal up to the order of sums."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.var_quantizer import EagerQuantizer
from hitsr_fast.nn import ResidualQuantizer
from hitsr_fast.ops import Metric, nearest_code
from hitsr_fast.pyramid import ScalePyramid
from tests.nn.eager import eager_of, randomize
from tests.tolerances import TOLERANCES

SAME = TOLERANCES["float64_reordered"]._asdict()
SCALES = [1, 2, (3, 4), 5, (6, 7)]
OPTIONS = [
    {"num_phi": phis, "metric": metric, "phi_ratio": ratio}
    for phis in (5, 1, 2, 4)
    for metric in ("l2", "cosine")
    for ratio in (0.5, 0.0)
]


def make(
    dtype: torch.dtype = torch.float64, scales: Any = SCALES, K: int = 40, **options: Any
) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(K, 3, ScalePyramid(scales), **options).to(dtype)
    randomize(quantizer)
    return quantizer


def assert_same_usage(quantizer: ResidualQuantizer, eager: EagerQuantizer) -> None:
    tolerance = TOLERANCES["float32_reordered"]._asdict()
    torch.testing.assert_close(quantizer.ema_vocab_hit_SV.float(), eager.hits, **tolerance)


def latent(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 6, 7, dtype=dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_the_training_pass_is_that_of_var(options: dict[str, Any]) -> None:
    quantizer = make(**options)
    eager, z = eager_of(quantizer), latent().requires_grad_()
    out, weight = quantizer(z), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    (out.loss + (out.reconstruction * weight).sum()).backward()
    expected_z = z.detach().clone().requires_grad_()
    expected = eager(expected_z)
    (expected.loss + (expected.reconstruction * weight).sum()).backward()

    assert torch.equal(out.indices, torch.cat(expected.indices, 1))
    pairs = [
        (out.reconstruction, expected.reconstruction),
        (out.loss, expected.loss),
        (z.grad, expected_z.grad),
        (quantizer.codebook.grad, eager.codebook.grad),
    ]
    if quantizer.phi_ratio:
        pairs += [
            (quantizer.phi_weight.grad, eager.phi_weight.grad),
            (quantizer.phi_bias.grad, eager.phi_bias.grad),
        ]
    for found, want in pairs:
        torch.testing.assert_close(found, want, **SAME)
    assert_same_usage(quantizer, eager)


def test_gradcheck_of_the_loss() -> None:
    """The part that has a gradient in codebook and phi, and the one that has a gradient in z.

    Finite differences see what a stopped gradient hides: each check takes the other part off, as a value.
    """
    quantizer = make(K=6, num_phi=1, scales=[1, 2, (2, 3)], commitment=0.5)
    z = torch.randn(1, 3, 2, 3, dtype=torch.float64)
    names = [name for name, _ in quantizer.named_parameters()]
    parameters = [parameter.detach().clone().requires_grad_() for parameter in quantizer.parameters()]

    def maps(tensors: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(
            MapsOf(quantizer), {f"quantizer.{n}": t for n, t in tensors.items()}, (z,)
        )
        return found

    def of_parameters(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        (loss,) = torch.func.functional_call(
            LossOf(quantizer), {f"quantizer.{n}": t for n, t in given.items()}, (z,)
        )
        each = maps(given).detach()
        return loss - 0.5 * F.mse_loss(z.expand_as(each), each)

    def of_latent(latent: Tensor) -> Tensor:
        each = maps({}).detach()
        return quantizer(latent).loss - F.mse_loss(each, latent.detach().expand_as(each))

    tolerance = TOLERANCES["gradcheck"]._asdict()
    assert torch.autograd.gradcheck(of_parameters, parameters, **tolerance)
    assert torch.autograd.gradcheck(of_latent, (z.clone().requires_grad_(),), **tolerance)


class MapsOf(torch.nn.Module):
    def __init__(self, quantizer: ResidualQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, z: Tensor) -> Tensor:
        maps = self.quantizer.quantize(z, per_scale=True).reconstructions
        assert maps is not None
        return maps


class LossOf(MapsOf):
    def forward(self, z: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (self.quantizer(z).loss,)


def test_straight_through() -> None:
    quantizer, z = make(), latent().requires_grad_()
    out = quantizer(z)
    torch.testing.assert_close(out.reconstruction, quantizer.quantize(z).reconstruction, **SAME)
    weight = torch.randn_like(z)
    (grad,) = torch.autograd.grad((out.reconstruction * weight).sum(), z)
    assert torch.equal(grad, weight)


def test_names_of_the_state_dict() -> None:
    state = make().state_dict()
    assert list(state) == ["codebook", "phi_weight", "phi_bias", "ema_vocab_hit_SV"]
    assert state["ema_vocab_hit_SV"].shape == (5, 40)
    assert list(make(track_usage=False).state_dict()) == ["codebook", "phi_weight", "phi_bias"]


def test_statistics_of_other_scales_are_left_out() -> None:
    source, target = make(scales=[1, (6, 7)]), make()
    source(latent())
    target(latent())
    before = target.ema_vocab_hit_SV.clone()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.ema_vocab_hit_SV, before)
    assert torch.equal(target.codebook, source.codebook)
    twin = make()
    twin.load_state_dict(target.state_dict())
    assert torch.equal(twin.ema_vocab_hit_SV, before)


def test_usage_of_the_codes() -> None:
    quantizer, z = make(), latent()
    eager = eager_of(quantizer)
    for _ in range(25):  # past the 100 ticks after which the average slows down
        z = torch.randn_like(z)
        quantizer(z)
        eager(z)
    assert quantizer.record_hit == 125
    assert_same_usage(quantizer, eager)
    assert quantizer.usage(z) == eager.usage(z)
    before = quantizer.ema_vocab_hit_SV.clone()
    quantizer.eval()(z)
    assert torch.equal(quantizer.ema_vocab_hit_SV, before)
    assert quantizer.record_hit == 125


def test_usage_is_summed_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(hits: Tensor) -> None:  # a second process that hits the same codes
        hits.mul_(2)

    alone, z = make(), latent()
    shared = copy.deepcopy(alone)
    alone(z)
    for name, stand_in in {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "all_reduce": all_reduce,
    }.items():
        monkeypatch.setattr(torch.distributed, name, stand_in)
    shared(z)
    assert torch.equal(shared.ema_vocab_hit_SV, 2 * alone.ema_vocab_hit_SV)
    usage = shared.usage(z)
    monkeypatch.undo()
    assert usage == alone.usage(z)


def test_decode_and_teacher_inputs() -> None:
    quantizer, z = make(), latent()
    eager = eager_of(quantizer)
    out, encoded = quantizer.quantize(z, return_inputs=True, per_scale=True), eager.encode(z, every_map=True)
    assert out.reconstructions is not None
    torch.testing.assert_close(out.reconstructions, torch.stack(encoded.maps), **SAME)
    torch.testing.assert_close(quantizer.decode(out.indices).reconstruction, encoded.maps[-1], **SAME)
    first = quantizer.decode(out.indices[:, : 1 + 4 + 12]).reconstruction
    torch.testing.assert_close(first, encoded.maps[2], **SAME)
    for found in (out.inputs, quantizer.teacher_inputs(out.indices)):
        torch.testing.assert_close(found, eager.teacher_inputs(encoded.indices), **SAME)
    with pytest.raises(ValueError, match=r"T one of \[1, 5, 17, 42, 84\], found \(2, 16\)"):
        quantizer.decode(out.indices[:, :16])


def test_other_scales_and_first_steps() -> None:
    quantizer, z = make(), latent()
    eager = eager_of(quantizer)
    scales = [2, 3, (5, 4), (6, 7)]
    for steps in (None, 2):
        found = quantizer.quantize(z, scales=scales, steps=steps)
        expected = eager.encode(z, scales=scales, steps=steps)
        assert torch.equal(found.indices, torch.cat(expected.indices, 1))
        torch.testing.assert_close(found.reconstruction, expected.maps[-1], **SAME)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_changed_codebook_is_searched(metric: Metric) -> None:
    quantizer = make(torch.float32, scales=[(6, 7)], metric=metric)
    z = latent(torch.float32)
    for _ in range(2):
        found = quantizer.quantize(z).indices
        assert torch.equal(found.flatten(), nearest_code(z, quantizer.codebook, metric=metric).flatten())
        quantizer.codebook.data.normal_()


def test_copies_and_files() -> None:
    quantizer, z = make(torch.float32), latent(torch.float32)
    expected = quantizer.eval()(z)
    file = io.BytesIO()
    torch.save(quantizer, file)
    file.seek(0)
    for twin in (copy.deepcopy(quantizer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(z).indices, expected.indices)
        assert torch.equal(twin(z).reconstruction, expected.reconstruction)


def test_half_precision_is_computed_in_float32() -> None:
    quantizer, z = make(torch.float32), latent(torch.float32).bfloat16()
    out, wide = quantizer.eval()(z), quantizer(z.float())
    assert out.reconstruction.dtype == torch.float32
    assert torch.equal(out.indices, wide.indices)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(z.float())
    assert torch.equal(cast.loss, wide.loss)


def test_compiles_without_a_graph_break() -> None:
    quantizer, z = make().eval(), latent().requires_grad_()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    found, expected = compiled(z), quantizer(z)
    assert torch.equal(found.indices, expected.indices)
    for a, b in zip(
        torch.autograd.grad(found.loss, [z, *quantizer.parameters()]),
        torch.autograd.grad(expected.loss, [z, *quantizer.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **SAME)


def test_training_compiles_and_counts() -> None:
    quantizer, z = make(), latent()
    torch.compile(quantizer, backend="aot_eager")(z)
    assert quantizer.record_hit == 5
    assert quantizer.ema_vocab_hit_SV.sum() > 0


def test_the_compiler_is_not_imported_for_it() -> None:
    code = "import sys; from hitsr_fast import HitSR; assert HitSR and 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_counts_of_sixteen_bit_modules_do_not_saturate() -> None:
    quantizer = ResidualQuantizer(2, 8, ScalePyramid((1, 2, 32))).bfloat16().train()
    quantizer(torch.randn(4, 8, 32, 32, dtype=torch.bfloat16))
    assert quantizer.ema_vocab_hit_SV[2].float().sum() >= 0.99 * 0.1 * 4 * 32 * 32


def test_fewer_scales_than_the_statistics_have_rows() -> None:
    quantizer = ResidualQuantizer(64, 8, ScalePyramid((1, 2, 4))).train()
    quantizer.pyramid = ScalePyramid((1, 4))
    z = torch.randn(2, 8, 4, 4)
    quantizer(z)
    assert quantizer.ema_vocab_hit_SV[2].eq(0).all() and len(quantizer.usage(z)) == 2


BAD_BANKS: list[tuple[dict[str, Any], str]] = [
    ({"codebook": torch.zeros(4)}, r"codebook: expected shape \(K, C\)"),
    ({"codebook": torch.zeros(4, 3, dtype=torch.int64)}, "codebook: expected dtype"),
    ({"codebook": [[0.0]]}, "codebook: expected a .* tensor, found list"),
    ({"phi_weight": torch.zeros(2, 3, 3)}, r"phi_weight: expected shape \(P, 3, 3, 3, 3\), found"),
    ({"phi_weight": torch.zeros(2, 3, 3, 3, 3).double()}, "phi_weight: expected dtype float32"),
    ({"phi_bias": torch.zeros(3, 3)}, r"phi_bias: expected shape \(P=2, C=3\), found \(3, 3\)"),
    ({"phi_index": (0, 2)}, "phi_index: expected an integer from 0 to 1, found 2"),
    ({"phi_index": (0, -1)}, "phi_index: expected an integer from 0 to 1, found -1"),
    ({"phi_index": (0.5,)}, "phi_index: expected an integer from 0 to 1, found 0.5"),
    ({"phi_ratio": 1.5}, "phi_ratio: expected a .*number from 0 to 1, found 1.5"),
    ({"metric": "dot"}, "metric: expected one of l2, cosine, found 'dot'"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_BANKS)
def test_a_bank_is_checked_when_made(wrong: dict[str, Any], message: str) -> None:
    bank = make(torch.float32, num_phi=2, metric="cosine").bank()
    with pytest.raises((TypeError, ValueError), match=message):
        replace(bank, **wrong)


def test_a_bank_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        make().bank().phi_ratio = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metric": "x"}, "metric: expected one of l2, cosine, found 'x'"),
        ({"phi_ratio": 3.0}, "phi_ratio: expected a .*number from 0 to 1, found 3"),
        ({"commitment": -1}, "commitment: expected a .*number of at least 0, found -1"),
        ({"num_phi": 0}, "num_phi: expected an integer of at least 1, found 0"),
        ({"phi_indexing": "local"}, "phi_indexing: expected one of global, per_target, found 'local'"),
        ({"codebook_size": 0}, "codebook_size: expected an integer of at least 1, found 0"),
        ({"code_dim": 2.5}, "code_dim: expected an integer of at least 1, found 2.5"),
    ],
)
def test_wrong_arguments_are_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ResidualQuantizer(**{"codebook_size": 4, "code_dim": 3, "pyramid": ScalePyramid((1, 2))} | wrong)

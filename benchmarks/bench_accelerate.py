"""A VAR by its own sampler and by ours: from a label to an image, VQVAE decoder included."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._harness import Benchmark, Call, Case, Inputs, Provider
from benchmarks._providers import our_backends
from benchmarks.peers.var_autoencoder import VQVAE
from benchmarks.peers.var_model import VAR
from benchmarks.shapes import MODELS
from hitsr_fast.compat import accelerate

CLASSES = 1000


@dataclass(frozen=True)
class VarCase(Case):
    """`B` images of a VAR of random weights, greedy.

    Attributes:
        B: images.
        cfg: guidance; 0 needs one branch only.
        depth: of VAR-dN: N blocks of N heads of 64 channels.
        model: whose scales they are; the image has 16 times the last one's side.
        ch: base width of the tokenizer.
    """

    B: int
    cfg: float
    depth: int = MODELS["var-256"].depth
    model: str = "var-256"
    ch: int = 160

    @property
    def items(self) -> int:
        return self.B

    @property
    def flops(self) -> int:
        """Blocks, classifier and decoder. AdaLN, once an image, is left out."""
        shape, width = MODELS[self.model], 64 * self.depth
        blocks = self.depth * (24 * width**2 * shape.tokens + 4 * width * shape.pairs)
        classifier = 2 * width * 4096 * shape.tokens
        branches = 1 if self.cfg == 0 else 2
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            self.tokenizer().fhat_to_img(torch.empty(self.B, 32, shape.scales[-1], shape.scales[-1]))
        return self.B * branches * (blocks + classifier) + counter.get_total_flops()

    def tokenizer(self) -> VQVAE:
        return VQVAE(ch=self.ch, v_patch_nums=MODELS[self.model].scales)

    def inputs(self, device: torch.device) -> Inputs:
        """The labels."""
        return (torch.arange(self.B, device=device) % CLASSES,)

    def expected(self, *inputs: Tensor) -> Tensor:
        return eager_call(self, inputs)()

    def wrong_rows(self, result: Tensor, expected: Tensor) -> int:
        """Images that are off by more than 1e-3 in more than a hundredth of their values.

        Where two codes are all but equally likely, a rounding decides, and what follows is another image;
        that is counted, too.
        """
        return int(((result - expected).abs() > 1e-3).flatten(1).float().mean(1).gt(0.01).sum())


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def _model(case: VarCase, device: torch.device) -> VAR:
    """Weights at which every block matters and a code stands out of the others."""
    torch.manual_seed(0)
    width = 64 * case.depth
    model = VAR(
        case.tokenizer(),
        num_classes=CLASSES,
        depth=case.depth,
        embed_dim=width,
        num_heads=case.depth,
        patch_nums=MODELS[case.model].scales,
    )
    model.init_weights(init_adaln_gamma=1.0, init_head=10.0)
    model.vae_proxy[0].quantize.embedding.weight.normal_(std=0.5)
    model.vae_proxy[0].to(device)
    model.rng = torch.Generator(device)
    model.uniform_prob = model.uniform_prob.to(device)
    return model.to(device).eval()


def _twin(model: VAR) -> VAR:
    """Another instance with the same tensors."""
    modules = (model, model.vae_proxy[0])
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _call(model: VAR, case: VarCase, labels: Tensor) -> Callable[[], Tensor]:
    return lambda: model.autoregressive_infer_cfg(case.B, labels, g_seed=0, cfg=case.cfg, top_k=1)


def eager_call(case: VarCase, inputs: Inputs) -> Call:
    """VAR's own sampler."""
    return _call(_model(case, inputs[0].device), case, inputs[0])


def _our_call(case: VarCase, inputs: Inputs) -> Call:
    return _call(accelerate(_twin(_model(case, inputs[0].device))), case, inputs[0])


BENCHMARK = Benchmark(
    op="accelerate",
    providers=(
        Provider("eager", eager_call),
        *our_backends(_our_call, lambda case, inputs: [], ("reference", None)),
    ),
    cases=(VarCase(1, 0.0), VarCase(1, 1.5)),
    quick=(
        VarCase(1, 0.0, depth=1, model="toy", ch=32),
        VarCase(2, 1.5, depth=1, model="toy", ch=32),
    ),
)

"""Graphs of an accelerated VAR on a stand-in for the device layer: the images are those of calls without."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.peers.var_model import VAR
from hitsr_fast.compat import accelerate
from hitsr_fast.ops import cuda_graphs
from tests.compat.test_accelerate import make
from tests.ops.fake_cuda import FakeCuda

DTYPES = pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own", "converted"])
DRAWN = {"label_B": 3, "g_seed": 0, "cfg": 1.5, "top_k": 9, "top_p": 0.9}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    fake.stand_in(monkeypatch)
    with fake.active():
        yield fake
    cuda_graphs._capture_stream.cache_clear()


def latent_model(fake: FakeCuda, dtype: torch.dtype | None = None, **options: Any) -> VAR:
    """An accelerated VAR on the device, whose images are its latents."""
    with _disable_current_modes():  # where making it takes long
        model = make((1, 2))
        for module in (model, model.vae_proxy[0].quantize):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = fake.put(tensor.data)
        model.uniform_prob = fake.put(model.uniform_prob)
    model.vae_proxy[0].fhat_to_img = lambda f_hat: f_hat
    return accelerate(model, dtype=dtype, **options)


class Pair:
    """The same VAR twice, with graphs and without."""

    def __init__(self, graphed: VAR, plain: VAR) -> None:
        self.both = graphed, plain

    @classmethod
    def on(cls, fake: FakeCuda, dtype: torch.dtype | None = None) -> Pair:
        return cls(latent_model(fake, dtype), latent_model(fake, dtype, cuda_graphs=False))

    def sample(self, B: int = 2, **options: Any) -> Tensor:
        """Images, which are the same."""
        found, expected = (model.autoregressive_infer_cfg(B, **DRAWN | options) for model in self.both)
        assert torch.equal(found, expected)
        return found


def test_other_numbers_are_no_other_graph(fake: FakeCuda) -> None:
    pair = Pair.on(fake)
    images = [
        pair.sample(cfg=cfg, top_k=top_k, top_p=top_p, label_B=label)
        for cfg, top_k, top_p, label in (
            (1.5, 9, 0.9, 3),
            (2.0, 9, 0.9, fake.put(torch.tensor([1, 7]))),
            (4.0, 6, 0.0, None),
            (-0.5, 0, 0.5, -1),
            (1.5, -1, 1.5, 3),
        )
    ]
    assert (fake.captures, fake.replays) == (1, 3)
    assert not any(torch.equal(one, other) for one, other in pairwise(images))


def test_other_steps_are_other_graphs(fake: FakeCuda) -> None:
    pair, captures = Pair.on(fake), []
    for kind in ({}, {"B": 3}, {"cfg": 0}, {"top_k": 1}):
        for seed in range(3):
            pair.sample(**kind, g_seed=seed)
        captures.append(fake.captures)
    assert captures == [1, 2, 3, 4] and fake.replays == 4


def test_mixtures_are_drawn_without_a_graph(fake: FakeCuda) -> None:
    pair = Pair.on(fake)
    for seed in range(3):
        pair.sample(more_smooth=True, g_seed=seed)
    assert fake.captures == 0


def write(how: str, model: VAR) -> None:
    """Change all parameters in place, the same way for the same model."""
    generator = torch.Generator().manual_seed(5)
    for parameter in (*model.parameters(), *model.vae_proxy[0].quantize.parameters()):
        noise = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
        if how == "no_grad":
            with torch.no_grad():
                parameter.add_(noise)
        elif how == "optimizer":
            parameter.grad = noise
            torch.optim.SGD([parameter], lr=1.0).step()
        else:
            parameter.data.add_(noise)


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        *((dtype, how) for dtype in (None, torch.bfloat16) for how in ("no_grad", "optimizer")),
        (None, "data"),  # which no converted copy sees
    ],
)
def test_weights_that_are_written_are_seen_by_the_same_graph(
    fake: FakeCuda, dtype: torch.dtype | None, how: str
) -> None:
    pair = Pair.on(fake, dtype)
    before = [pair.sample() for _ in range(3)][-1]
    for model in pair.both:
        write(how, model)
    assert not torch.equal(pair.sample(), before)
    assert (fake.captures, fake.replays) == (1, 2)


@DTYPES
def test_weights_in_another_place_are_another_graph(fake: FakeCuda, dtype: torch.dtype | None) -> None:
    pair = Pair.on(fake, dtype)
    for _ in range(3):
        pair.sample()
    for model in pair.both:
        for parameter in model.parameters():
            parameter.data = 1.1 * parameter.data
    for _ in range(3):
        pair.sample()
    assert (fake.captures, fake.replays) == (2, 2)


@DTYPES
def test_graphs_outlive_inference_mode(fake: FakeCuda, dtype: torch.dtype | None) -> None:
    """Also a converted copy that was made within it."""
    pair = Pair.on(fake, dtype)
    with torch.inference_mode():
        for _ in range(2):
            pair.sample()
    pair.sample()
    for model in pair.both:
        write("no_grad", model)
    pair.sample()
    assert (fake.captures, fake.replays) == (1, 2)


@DTYPES
def test_undo_gives_the_memory_back(fake: FakeCuda, dtype: torch.dtype | None) -> None:
    model = latent_model(fake, dtype)
    for _ in range(3):
        model.autoregressive_infer_cfg(2, **DRAWN)
    assert fake.captures == 1 and fake.reserved() > 0
    model.undo()
    assert fake.reserved() == 0


def test_each_dtype_has_its_graph(fake: FakeCuda) -> None:
    pair = Pair.on(fake)
    for _ in range(3):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                pair.sample()
    assert fake.captures == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_graphs_draw_what_plain_calls_draw(dtype: torch.dtype) -> None:
    models = [make((1, 2)).cuda() for _ in range(2)]
    for model in models:
        model.vae_proxy[0].cuda()
        model.rng, model.uniform_prob = torch.Generator("cuda"), model.uniform_prob.cuda()
    graphed, plain = models
    pair = Pair(accelerate(graphed, dtype=dtype), accelerate(plain, dtype=dtype, cuda_graphs=False))
    for call, (cfg, top_k, top_p) in enumerate([(1.5, 9, 0.9), (4.0, 6, 0.0), (0.5, 0, 0.5), (2.0, 20, 0.9)]):
        pair.sample(cfg=cfg, top_k=top_k, top_p=top_p, g_seed=call)
        pair.sample(3, cfg=0, top_k=top_k, g_seed=call)
    for model in pair.both:
        write("no_grad", model)
    pair.sample()

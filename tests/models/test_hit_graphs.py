"""Graphs of the sampler on a stand-in for the device layer: what is captured and drawn, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.models import HitSampler, HitTransformer, HitVar
from hitsr_fast.models.hit_var.config import HIT_D16
from hitsr_fast.nn.cached_body import CachedBody
from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.ops import cuda_graphs
from hitsr_fast.ops.cuda_graphs import Graphs
from tests.models.micro import micro_model
from tests.ops.fake_cuda import FakeCuda

GIB = 2**30
NUMBERS: list[dict[str, Any]] = [
    {"guidance": 1.5, "top_k": 9, "top_p": 0.9},
    {"guidance": 4.0, "top_k": 5, "top_p": 0.7, "temperature": 0.5},
    {"guidance": 0.2, "top_k": 0},
    {"guidance": 2.0, "top_k": 9, "top_p": 1.0, "temperature": 3.0},
]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    fake.stand_in(monkeypatch)
    with fake.active():
        yield fake
    cuda_graphs._capture_stream.cache_clear()


def inputs(fake: FakeCuda, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    features = torch.randn(batch, 6, 8, 8, generator=torch.Generator().manual_seed(seed))
    return fake.put(features), fake.put(torch.arange(batch) % 2)


def check_same(samplers: list[HitSampler], given: tuple[Tensor, Tensor], options: SamplingOptions) -> Tensor:
    """Tokens of both samplers, which agree in all."""
    (tokens, latents), (expected, maps) = (sampler.sample(*given, options) for sampler in samplers)
    assert torch.equal(tokens, expected)
    assert all(torch.equal(one, other) for one, other in zip(latents, maps, strict=True))
    return tokens


@torch.no_grad()
def test_one_graph_draws_by_all_numbers(fake: FakeCuda) -> None:
    model, drawn = micro_model(), set()
    samplers = [HitSampler(model), HitSampler(model, cuda_graphs=False)]
    for call in range(6):
        options = SamplingOptions(**NUMBERS[call % len(NUMBERS)], seed=call)
        drawn.add(tuple(check_same(samplers, inputs(fake, call), options).flatten().tolist()))
        assert (fake.captures, fake.replays) == (int(call > 0), max(call - 1, 0))
    assert len(drawn) == 6


@torch.no_grad()
def test_other_steps_are_other_graphs(fake: FakeCuda) -> None:
    """Batch, scales that are run, scales that are guided, greedy or drawn."""
    model = micro_model()
    samplers = [HitSampler(model), HitSampler(model, cuda_graphs=False)]
    guided: dict[str, Any] = {"guidance": 1.0}
    kinds: list[tuple[int, dict[str, Any]]] = [
        (2, {}),
        (2, guided),
        (2, guided | {"guided_scales": [2]}),
        (2, {"top_k": 4}),
        (1, guided),
    ]
    captures = []
    for batch, kind in kinds:
        for call in range(3):
            changed = {"top_p": 0.9 - call / 9} | ({"guidance": 1.0 + call} if "guidance" in kind else {})
            check_same(samplers, inputs(fake, call, batch), SamplingOptions(**kind | changed, seed=1))
        captures.append(fake.captures)
    assert captures == [1, 2, 3, 4, 5] and fake.replays == 5


@torch.no_grad()
def bytes_of_graphs(
    sampler: HitSampler, calls: Sequence[tuple[int, dict[str, Any]]], patch: pytest.MonkeyPatch
) -> int:
    """What the graphs of meta tensors have taken after some calls of batch and options."""
    fake, device = FakeCuda(memory=141 * GIB), torch.device("meta")
    fake.stand_in(patch)
    graphs, scales = Graphs(sampler._walk), len(sampler.pyramid.scales)
    with fake.active():
        for batch, options in calls:
            plan = SamplingOptions(**options).plan(scales, scales)
            states = None if plan.top_k == 1 else torch.empty(scales, 2, dtype=torch.int64, device=device)
            features = torch.empty(batch, 32, 32, 32, device=device)
            classes = torch.empty(batch, dtype=torch.int64, device=device)
            graphs((features, classes, states, plan.settings(device)), plan.kind)
        return fake.reserved()


@pytest.mark.parametrize("depth", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_graphs_share_one_cache(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """hit-d16 in bfloat16, 8 images, guided: of all numbers and kinds 1.2 caches and the workspace.

    The workspace is what the graph of a walk takes that is given a cache: activations, as the allocator keeps
    them, what is copied in, and results. That of 16 blocks is that of two.
    """
    monkeypatch.setattr(HitTransformer, "init_weights", lambda _: None)
    config = replace(HIT_D16, transformer=replace(HIT_D16.transformer, depth=depth))
    with torch.device("meta"):
        sampler = HitSampler(HitVar(config), dtype=torch.bfloat16)
    cache = sampler.body.new_cache(16, 1024 + sampler.pyramid.num_tokens)
    guided = {"guidance": 1.5, "top_k": 900, "top_p": 0.96}
    with monkeypatch.context() as patch:
        patch.setattr(CachedBody, "new_cache", lambda *_: cache)
        workspace = bytes_of_graphs(sampler, [(8, guided)] * 2, patch)
    others = [
        {"guidance": 4.0, "top_k": 600, "top_p": 0.5},
        {"guidance": 0.1, "top_k": 0, "temperature": 2.0},
    ]
    kinds = [(8, {}), (8, {"guidance": 1.0}), (4, guided)]
    calls = [(8, guided), *((8, numbers) for numbers in others * 2), *kinds * 2]
    size = cache.k.nbytes + cache.v.nbytes
    assert size == depth / 16 * 4.37109375 * GIB and 0.5 * GIB < workspace < 2 * GIB
    assert size + 0.9 * workspace < bytes_of_graphs(sampler, calls, monkeypatch) <= 1.2 * size + workspace


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_replayed_graphs_draw_what_the_eager_walk_draws(dtype: torch.dtype) -> None:
    """By numbers that change from call to call, greedily too."""
    model = micro_model().cuda()
    samplers = [HitSampler(model, dtype=dtype), HitSampler(model, dtype=dtype, cuda_graphs=False)]
    greedy = [{"guidance": 1.0}, {"guidance": 3.0}, {"guidance": 0.5}]
    for call, options in enumerate([*NUMBERS, *NUMBERS, *greedy]):
        features = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(call))
        given = features.cuda(), (torch.arange(2) % 2).cuda()
        check_same(samplers, given, SamplingOptions(**options, seed=call))

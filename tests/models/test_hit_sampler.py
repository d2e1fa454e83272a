"""The fast sampler is the plain one, is the training forward step by step, and never waits for a device."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hitsr_fast.models import HitSampler, HitTransformer, HitVar
from hitsr_fast.models.hit_var.config import HitConfig
from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.reference import hit_sampler as reference
from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES

SCALES = MICRO.tokenizer.scales
LENGTHS = MICRO.tokenizer.pyramid.lengths
TOKENS = MICRO.tokenizer.pyramid.num_tokens
CLASS_FREE = MICRO.transformer.num_classes - 1


def variant(**options: object) -> HitConfig:
    return replace(MICRO, transformer=replace(MICRO.transformer, **options))  # type: ignore[arg-type]


VARIANTS = {
    "default": MICRO,
    "full grid": variant(ar_grid="full"),
    "no l2 norm": variant(attn_l2_norm=False),
    "injection, gates, bicubic": variant(
        prefix_injection=True, gate_init=0.5, position_resample="bicubic", position_grid=12
    ),
}


def inputs(seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    """LR features in float64, and classes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, 6, 8, 8, generator=generator, dtype=torch.float64)
    return features, torch.arange(batch) % 2


def uncached_greedy(
    model: HitVar, features: Tensor, classes: Tensor, strengths: tuple[float, ...]
) -> tuple[Tensor, list[Tensor]]:
    """Greedy decoding by whole forwards, and their logits scale by scale: nothing is cached."""
    config = model.config
    tokens = torch.zeros(len(features), TOKENS, dtype=torch.int64)
    start, seen = 0, []
    for step, strength in enumerate(strengths):
        rows = model.tokenizer.quantize.teacher_inputs(tokens, ar_grid=config.transformer.ar_grid)
        rows = rows.to(features.dtype)
        logits = model.transformer(features, classes, rows)
        if strength:
            free = model.transformer(features, torch.full_like(classes, CLASS_FREE), rows)
            logits = (1 + strength) * logits - strength * free
        end = start + LENGTHS[step]
        seen.append(logits[:, start:end])
        tokens[:, start:end] = seen[-1].argmax(-1)
        start = end
    return tokens[:, :start], seen


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({}, 3),
        ({"guidance": 1.5}, 3),
        ({}, 1),
        ({"guidance": 2.0}, 2),
        ({"guidance": 3.0, "guided_scales": [1, 3]}, 3),
    ],
    ids=str,
)
@torch.no_grad()
def test_cached_sampling_equals_the_uncached_forward_token_for_token(
    config: HitConfig, options: dict[str, Any], targets: int
) -> None:
    model = micro_model(config, torch.float64)
    features, classes = inputs()
    sampling = SamplingOptions(**options)
    tokens, finished = HitSampler(model).sample(features, classes, sampling, targets=targets)
    plan = sampling.plan(len(SCALES), MICRO.tokenizer.pyramid.steps[targets - 1])
    assert torch.equal(tokens, uncached_greedy(model, features, classes, plan.strengths)[0])
    assert tokens.unique().numel() > 2 * targets, "the test would prove little on a constant"
    assert len(finished) == targets
    for target, latent in enumerate(finished):
        expected = model.tokenizer.quantize.decode(tokens, target).reconstruction
        torch.testing.assert_close(latent.double(), expected, **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_logits_of_cached_steps_are_those_of_the_whole_forward(
    config: HitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = micro_model(config, torch.float64)
    sampler, found = HitSampler(model), []

    def record(rows: Tensor, logits: Any = sampler.classifier.logits) -> Tensor:
        found.append(logits(rows))
        return found[-1]

    monkeypatch.setattr(sampler.classifier, "logits", record)
    features, classes = inputs()
    sampler.sample(features, classes)
    _, expected = uncached_greedy(model, features, classes, (0.0,) * len(SCALES))
    for step, logits in enumerate(found):
        logits = logits.view_as(expected[step])
        torch.testing.assert_close(logits, expected[step], **TOLERANCES["float32_reordered"]._asdict())


def test_phi_is_laid_out_once() -> None:
    """The channels of a tap lie together, as the steps read them on a GPU."""
    for bank in HitSampler(micro_model(MICRO)).banks:
        assert bank.phi_weight.permute(0, 3, 4, 1, 2).is_contiguous()


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "guided_scales": [1, 3]}], ids=["one", "two"])
@torch.no_grad()
def test_codes_found_in_parts_are_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, seen = HitSampler(micro_model(MICRO)), []
    features, classes = inputs()
    whole, _ = sampler.sample(features, classes, SamplingOptions(**options))

    def record(rows: Tensor, logits: Any = sampler.classifier.logits) -> Tensor:
        seen.append(rows.shape[1])
        return logits(rows)

    monkeypatch.setattr(sampler.classifier, "logits", record)
    monkeypatch.setattr(sampler.classifier, "cached_rows", 3)
    parts, _ = sampler.sample(features, classes, SamplingOptions(**options))
    assert torch.equal(whole, parts)
    assert max(seen) == 3 and sum(seen) == len(features) * sum(LENGTHS)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance": 2.0, "guided_scales": [2, 4], "top_k": 5, "top_p": 0.9}],
    ids=["greedy", "all"],
)
@torch.no_grad()
def test_the_plain_sampler_finds_the_same(config: HitConfig, options: dict[str, Any]) -> None:
    model = micro_model(config, torch.float64)
    features, classes = inputs()
    sampling = SamplingOptions(**options)
    plan = sampling.plan(len(SCALES), len(SCALES))
    tokens, finished = HitSampler(model).sample(
        features, classes, sampling, generator=torch.Generator().manual_seed(3)
    )
    expected, maps = reference.sample(
        model,
        features,
        classes,
        strengths=plan.strengths if options else None,
        top_k=plan.top_k,
        top_p=plan.top_p,
        states=plan.states(features.device, torch.Generator().manual_seed(3)),
    )
    assert torch.equal(tokens, expected)
    for latent, other in zip(finished, maps, strict=True):
        torch.testing.assert_close(latent, other, **TOLERANCES["float64_reordered"]._asdict())


@torch.no_grad()
def test_guidance_changes_the_tokens_but_not_those_of_the_first_scale() -> None:
    sampler = HitSampler(micro_model(dtype=torch.float64))
    features, classes = inputs()
    plain, _ = sampler.sample(features, classes)
    guided, _ = sampler.sample(features, classes, SamplingOptions(guidance=4.0))
    assert torch.equal(plain[:, :1], guided[:, :1])
    assert not torch.equal(plain, guided)


@torch.no_grad()
def test_the_class_free_branch_ends_with_the_last_guided_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, batches = HitSampler(micro_model()), []

    def record(x: Tensor, *rest: Any, body: Any = sampler.body) -> Any:
        batches.append(len(x))
        return body(x, *rest)

    record.new_cache = sampler.body.new_cache  # type: ignore[attr-defined]
    monkeypatch.setattr(sampler, "body", record)
    features, classes = inputs()
    sampler.sample(features, classes, SamplingOptions(guidance=1.0, guided_scales=[1, 2]))
    assert batches == [4, 4, 4, 2, 2, 2]
    batches.clear()
    sampler.sample(features, classes)
    assert batches == [2] * 6


@given(seed=st.integers(0, 1000))
@torch.no_grad()
def test_sampling_repeats_with_a_seeded_generator(seed: int) -> None:
    sampler = HitSampler(micro_model())
    features, classes = inputs(batch=1)

    def draw(seed: int) -> Tensor:
        options = SamplingOptions(top_k=10, top_p=0.9, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        tokens, _ = sampler.sample(features, classes, options, targets=2)
        again, _ = sampler.sample(
            features, classes, replace(options, seed=None), targets=2, generator=generator
        )
        assert torch.equal(tokens, again)
        return tokens

    first = draw(seed)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(first, draw(seed))
    assert not torch.equal(first, draw(seed + 1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"lr_features": torch.zeros(2, 6, 8, 7)},
            ValueError,
            r"lr_features: expected shape \(B, C=6, h=8, w=8\)",
        ),
        ({"lr_features": torch.zeros(2, 6, 8, 8).int()}, TypeError, "lr_features: expected dtype float16 or"),
        ({"class_id": torch.zeros(3, dtype=torch.int64)}, ValueError, r"class_id: expected shape \(B=2\)"),
        ({"class_id": torch.zeros(2)}, TypeError, "class_id: expected dtype int64"),
        (
            {"class_id": torch.tensor([0, 3])},
            ValueError,
            "class_id: expected indices from 0 to 2, found 0 to 3",
        ),
        ({"class_id": torch.tensor([0, -1])}, ValueError, "class_id: expected .*, found -1 to 0"),
        ({"targets": 0}, ValueError, "targets: expected an integer from 1 to 3, found 0"),
        ({"targets": 4}, ValueError, "targets: expected an integer from 1 to 3, found 4"),
        ({"targets": 1.5}, TypeError, "targets: expected an integer from 1 to 3, found 1.5"),
        (
            {"options": SamplingOptions(top_k=2), "generator": 5},
            TypeError,
            "generator: expected a torch.Generator or None, found 5",
        ),
        (
            {"options": SamplingOptions(guided_scales=[6])},
            ValueError,
            r"guided_scales: expected numbers from 0 to 5, found \[6\]",
        ),
    ],
)
def test_wrong_arguments_are_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    features, classes = inputs()
    with pytest.raises(error, match=message):
        HitSampler(micro_model()).sample(**({"lr_features": features, "class_id": classes} | changes))


def test_integers_are_no_dtype_to_compute_in() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected float16 or .*, found int8"):
        HitSampler(micro_model(), dtype=torch.int8)


@pytest.mark.parametrize("options", [{}, {"guidance": 1.0, "guided_scales": [2], "top_k": 4}], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_image_that_overflows_has_latents_of_nan_and_others_do_not(
    bad: float, options: dict[str, Any]
) -> None:
    sampler, (features, classes) = HitSampler(micro_model()), inputs(batch=3)
    features[1, 2, 3, 4] = bad
    for latent in sampler.sample(features, classes, SamplingOptions(**options))[1]:
        assert latent[1].isnan().all() and latent[[0, 2]].isfinite().all()


def test_what_is_drawn_does_not_depend_on_the_targets() -> None:
    sampler, (features, classes) = HitSampler(micro_model()), inputs()
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for _ in range(2):  # the generators agree afterwards, too
        few, all_ = (
            sampler.sample(features, classes, SamplingOptions(top_k=0), targets=targets, generator=generator)[
                0
            ]
            for targets, generator in zip((1, 3), generators, strict=True)
        )
        assert torch.equal(few, all_[:, : few.shape[1]])


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype, autocast: torch.dtype) -> None:
    sampler, (features, classes) = HitSampler(micro_model(), dtype=dtype), inputs()
    expected = sampler.sample(features, classes)
    with torch.autocast("cpu", autocast):
        found = sampler.sample(features, classes)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_weights_are_held_once() -> None:
    model = micro_model()
    block, original = HitSampler(model).body.blocks[0], model.transformer.blocks[0]
    assert block.qkv_weight.data_ptr() == original.attn.mat_qkv.weight.data_ptr()
    assert block.fc1_weight.data_ptr() == original.ffn.fc1.weight.data_ptr()
    half = HitSampler(model, dtype=torch.bfloat16)
    for found in half.body.blocks:
        *weights, q_scale = found
        assert {weight.dtype for weight in weights} == {torch.bfloat16} and q_scale.dtype == torch.float32
    layers, width = MICRO.transformer.depth, MICRO.transformer.width
    assert half.modulation.shape == (layers, 6, 3, width)


@torch.no_grad()
def test_bfloat16_decides_as_float32_does() -> None:
    """Given the same earlier tokens, so that one other code does not change all that follow."""
    model = HitVar.from_pretrained("hit-tiny", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    lr = torch.rand(2, 3, 8, 8, generator=generator)  # smooth, as photos are
    lr = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1) * 2 - 1
    features, classes = model.lr_features(lr), torch.zeros(2, dtype=torch.int64)
    expected, _ = HitSampler(model).sample(features, classes)
    assert forced_agreement(HitSampler(model, dtype=torch.bfloat16), features, classes, expected) >= 0.98


def forced_agreement(sampler: HitSampler, features: Tensor, classes: Tensor, tokens: Tensor) -> float:
    """Share of greedy choices that are those of `tokens`, each after the earlier ones of `tokens`."""
    chosen: list[Tensor] = []
    codes = sampler.classifier.codes

    def forced(rows: Tensor, *rest: Any) -> Tensor:
        start = sum(part.shape[1] for part in chosen)
        chosen.append(codes(rows, *rest))
        return tokens[:, start : start + rows.shape[1]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.classifier, "codes", forced)
        sampler.sample(features, classes)
    return float((torch.cat(chosen, 1) == tokens).float().mean())


@pytest.mark.parametrize("options", [{}, {"guidance": 1.0, "guided_scales": [2], "top_k": 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_never_waits_for_the_device(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake CUDA tensors have no values: whatever looks at one raises."""
    monkeypatch.setattr(HitTransformer, "init_weights", lambda _: None)  # it looks at what it has drawn
    with FakeTensorMode(), torch.device("cuda"):
        sampler = HitSampler(HitVar(MICRO), dtype=dtype)
        features, classes = torch.randn(2, 6, 8, 8), torch.zeros(2, dtype=torch.int64)
        tokens, latents = sampler.sample(features, classes, SamplingOptions(**options))
        assert (tokens.device.type, tokens.shape) == ("cuda", (2, TOKENS))
        assert [tuple(latent.shape) for latent in latents] == [(2, 6, side, side) for side in (2, 4, 8)]
        with pytest.raises(DataDependentOutputException):
            int(tokens[0, 0])


@pytest.mark.parametrize("options", [{}, {"guidance": 1.0, "guided_scales": [2], "top_k": 4}], ids=str)
@torch.no_grad()
def test_the_whole_walk_is_one_graph_to_a_compiler(options: dict[str, Any]) -> None:
    sampler = HitSampler(micro_model())
    features, classes = inputs()
    plan = SamplingOptions(**options).plan(len(SCALES), len(SCALES))
    given = (
        features.float(),
        classes,
        plan.states(features.device, torch.Generator().manual_seed(0)),
        None,
        plan,
    )
    compiled = torch.compile(sampler._walk, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*given), sampler._walk(*given), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_pytorchs_own_compiler_takes_it(dtype: torch.dtype) -> None:
    sampler, (features, classes) = HitSampler(micro_model(), dtype=dtype), inputs()
    compiled = torch.compile(sampler.sample, fullgraph=True)
    found, expected = compiled(features, classes, targets=1), sampler.sample(features, classes, targets=1)
    for latent, plain in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(latent, plain, **TOLERANCES["float32_reordered"]._asdict())


def test_a_copy_and_a_cast_forget_the_graphs() -> None:
    sampler = HitSampler(micro_model(), dtype=torch.bfloat16)
    graphs = sampler._graphs
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert other._graphs is not graphs and other._graphs._launch.__self__ is other
        assert all(
            torch.equal(a, b)
            for a, b in zip(other.sample(*inputs())[1], sampler.sample(*inputs())[1], strict=True)
        )
    wide = sampler.to(torch.float32)
    assert wide._graphs is not graphs and wide._graphs._launch.__self__ is wide
    assert (wide.body_dtype, sampler.body_dtype) == (torch.float32, torch.bfloat16)
    tokens, _ = wide.sample(*inputs())
    assert tokens.shape == (2, TOKENS)

"""Each task: its loss and gradient against the formula in float64, its samples, optimisers, artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.pyramid import ScalePyramid
from hitsr_fast.train.config import ParallelConfig, PrecisionConfig, TaskConfig
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.task import Batch
from hitsr_fast.train.tasks import base as base_module
from tests.models.micro import micro_model
from tests.train import task_checks as checks
from tests.train.task_checks import AUTOENCODE, BATCH, CLOSE, CONFIG, DECODE, NEXT_SCALE, TOKENIZE, make

GAN = replace(TOKENIZE, gan_weight=0.3)
PLAIN = replace(TOKENIZE, hierarchical=False, train="quantizer and decoders")
EVERY = [AUTOENCODE, TOKENIZE, GAN, PLAIN, NEXT_SCALE, DECODE, replace(DECODE, top_k=4)]


def test_autoencode_is_its_formula() -> None:
    checks.check_autoencode()


@pytest.mark.parametrize("train", ["all", "quantizer and decoders", "quantizer", "decoders"])
def test_tokenize_is_its_formula(train: str) -> None:
    checks.check_tokenize(train)


def test_tokenize_plain_and_summed_is_its_formula() -> None:
    checks.check_tokenize("quantizer and decoders", hierarchical=False)
    checks.check_tokenize("quantizer and decoders", targets="sum")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mistakes": 0.0, "preference_reduction": "sum"},
        {"hierarchical": False, "preference_classes": (1,)},
    ],
    ids=str,
)
def test_next_scale_is_its_formula(changes: dict[str, Any]) -> None:
    checks.check_next_scale(**changes)


@pytest.mark.parametrize("top_k", [1, 4])
def test_decode_is_its_formula(top_k: int) -> None:
    checks.check_decode(top_k)


def gradients(
    task: Any, batch: Batch, rows: slice | list[int], seed: int = 0
) -> tuple[Any, dict[str, Tensor]]:
    """Losses of some of the samples, and the gradient of each weight times their number."""
    part = Batch(batch.images[rows], batch.index[rows])
    task.zero_grad(set_to_none=True)
    losses = task(part, checks.draw_of(part, seed))
    (losses.total * len(part.index)).backward()
    return losses, {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.kind)
def test_a_batch_is_the_sum_of_its_samples(config: TaskConfig) -> None:
    """Every other sample and the rest, as two processes have them: loss, gradients, means and counts."""
    task, batch = make(config), checks.samples()
    whole, expected = gradients(task, batch, slice(None))
    parts = [gradients(task, batch, rows) for rows in (slice(0, None, 2), slice(1, None, 2))]
    sum_of = sum(losses.total.detach() for losses, _ in parts)
    torch.testing.assert_close(sum_of / 2, whole.total.detach(), **CLOSE)
    for name in whole.means:
        found = sum(losses.means[name] for losses, _ in parts) / 2
        torch.testing.assert_close(found, whole.means[name], **CLOSE)
    for name in whole.counts:
        assert torch.equal(sum(losses.counts[name] for losses, _ in parts), whole.counts[name])
    assert all(found.keys() == expected.keys() for _, found in parts), "a process waits for a gradient"
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-3 * largest)
        found = sum(found[name] for _, found in parts)
        torch.testing.assert_close(
            found / scale, gradient / scale, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("sampled", [0.0, 1.0])
def test_each_weight_of_the_decoders_has_a_gradient_whatever_is_drawn(sampled: float) -> None:
    """Of a batch in which the low-resolution image is seen by all, or by none."""
    task, batch = make(DECODE, sampled=0.5), checks.samples()
    task.config = replace(task.config, sampled=sampled)
    _, found = gradients(task, batch, slice(None))
    assert found.keys() == {name for name, p in task.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", EVERY[:-1], ids=lambda config: config.kind)
def test_a_seed_is_all_that_is_random(config: TaskConfig) -> None:
    """The same with other numbers in PyTorch's own generators; other with another seed."""
    task, batch = make(config), checks.samples()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        losses, _ = gradients(task, batch, slice(None), seed)
        found.append(losses.total.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_tokenize_with_a_discriminator() -> None:
    """Reconstruction plus 0.3 times -D(output), which teaches the decoder alone, plus D's own hinge loss."""
    plain, task, batch = make(TOKENIZE), make(GAN, gan_from=2), checks.samples()
    task.discriminator.requires_grad_(True)
    base, without = gradients(plain, batch, slice(None))
    found, gradient = gradients(task, batch, slice(None))
    seen: list[tuple[Tensor, Tensor]] = []
    original = task.frozen.distance.forward

    def record(output: Tensor, target: Tensor, draw: Draw) -> Tensor:
        seen.append((output, target))
        return original(output, target, draw)

    task.frozen.distance.forward = record
    task.zero_grad(set_to_none=True)
    task(batch, checks.draw_of(batch))
    D = task.discriminator
    generator = torch.stack([-D(output).flatten(1).mean(1) for output, _ in seen]).mean()
    hinge = torch.stack(
        [
            ((1 - D(target)).clamp_min(0).mean() + (1 + D(output.detach())).clamp_min(0).mean()) / 2
            for output, target in seen
        ]
    ).mean()
    torch.testing.assert_close(found.total.detach(), base.total + 0.3 * generator + hinge, **CLOSE)
    names = [name for name, p in task.named_parameters() if p.requires_grad]
    own = [name for name in names if name.startswith("discriminator.")]
    others = [name for name in names if name not in own]
    weights = dict(task.named_parameters())
    expected = dict(zip(own, torch.autograd.grad(hinge, [weights[n] for n in own]), strict=True))
    added = torch.autograd.grad(0.3 * generator, [weights[n] for n in others], allow_unused=True)
    for name, extra in zip(others, added, strict=True):
        expected[name] = without[name] / BATCH + (0 if extra is None else extra)
    largest = max(g.abs().max() for g in expected.values())
    for name in names:
        scale = expected[name].abs().max().clamp_min(1e-3 * largest)
        torch.testing.assert_close(gradient[name] / BATCH / scale, expected[name] / scale, **CLOSE)


def test_the_discriminator_learns_before_its_loss_counts() -> None:
    """From `gan_from` on, a step by the global index of its samples, the decoders follow it."""
    task, before, after = make(GAN, gan_from=3), checks.samples(2 * BATCH), checks.samples(3 * BATCH)
    for batch, counts in ((before, False), (after, True)):
        losses, found = gradients(task, batch, slice(None))
        assert found["discriminator.layers.0.weight"].any()
        parts = [v for k, v in losses.means.items() if k.startswith("generator")]
        task.config = replace(task.config, gan_from=0)
        other, _ = gradients(task, batch, slice(None))
        task.config = replace(task.config, gan_from=3)
        missing = 0.0 if counts else 0.3 * torch.stack(parts).mean()
        torch.testing.assert_close(other.total - losses.total, torch.as_tensor(missing), **CLOSE)


ADAM = "adamw"
MATRICES = ("mat_qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")


def image_rule(name: str) -> object:
    """The group of a tokenizer's or discriminator's parameter; only kernels and matrices decay."""
    part = name.split(".")[0]
    group = {"quant_conv": "encoder", "quantize": "quantizer"}.get(part, part)
    if group == "quantizer":
        return (group, ADAM, 0.4, 0.0)
    is_norm = "norm" in name or (part == "discriminator" and name.split(".")[2] in ("3", "6", "9"))
    return (group, ADAM, 0.1, 0.2 if name.endswith("weight") and not is_norm else 0.0)


def transformer_rule(name: str, muon: bool = True) -> object:
    """Muon on the blocks' matrices, AdamW on the rest, of which only linear layers decay."""
    if ".blocks." in name and name.endswith(MATRICES):
        return ("transformer", "muon", 0.3, 0.2) if muon else ("transformer", ADAM, 0.1, 0.2)
    linear = ("ada_lin.1.weight", "head.weight", "word_embed.weight", "prefix_embed.weight")
    return ("transformer", ADAM, 0.1, 0.2 if name.endswith(linear) else 0.0)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (AUTOENCODE, image_rule),
        (GAN, image_rule),
        (replace(TOKENIZE, train="quantizer"), image_rule),
        (DECODE, image_rule),
        (NEXT_SCALE, transformer_rule),
    ],
)
def test_each_weight_has_its_optimiser(config: TaskConfig, rule: Callable[[str], object]) -> None:
    found = checks.check_optimizers(config)
    assert found == {name: rule(name) for name in found}


def test_without_muon_adamw_takes_all() -> None:
    found = checks.check_optimizers(NEXT_SCALE, optim=replace(checks.OPTIM, muon_lr=0.0))
    assert found == {name: transformer_rule(name, muon=False) for name in found}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (AUTOENCODE, {"encoder", "quant_conv", "decoders"}),
        (TOKENIZE, {"encoder", "quant_conv", "quantize", "decoders"}),
        (replace(TOKENIZE, train="quantizer and decoders"), {"quantize", "decoders"}),
        (replace(TOKENIZE, train="quantizer"), {"quantize"}),
        (replace(TOKENIZE, train="decoders"), {"decoders"}),
        (NEXT_SCALE, {"transformer"}),
        (DECODE, {"decoders"}),
    ],
)
def test_what_is_trained(config: TaskConfig, parts: set[str]) -> None:
    assert {name.split(".")[0] for name in checks.check_optimizers(config)} == parts


def test_a_rate_of_zero_freezes_the_codebook() -> None:
    task = make(TOKENIZE, train="quantizer and decoders", optim=replace(checks.OPTIM, quantizer_lr=0.0))
    assert {group.name for group in task.groups()} == {"decoders"}
    assert "quantize.codebook" in task.state_dict(), "what k-means starts it from is part of a checkpoint"
    shared = make(TOKENIZE, optim=replace(checks.OPTIM, quantizer_lr=None))
    assert {g.lr for g in shared.groups() if g.name == "quantizer"} == {0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gan_weight": 0.1, "parallel": ParallelConfig(strategy="fsdp")}, "strategy.*ddp.*gan_weight.*fsdp"),
        ({"revive_below": 0.1, "parallel": ParallelConfig(strategy="fsdp")}, "strategy.*revive_below.*fsdp"),
        ({"gan_weight": 0.1, "train": "quantizer"}, "gan_weight: expected 0"),
        ({"revive_below": 0.1, "train": "decoders"}, "revive_below: expected 0"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(TOKENIZE, **changes)


def test_mistakes_are_of_fewer_codes_than_there_are() -> None:
    with pytest.raises(ValueError, match="mistake_codes: expected fewer than the model's 48 codes, found 48"):
        make(NEXT_SCALE, mistake_codes=48)


@pytest.mark.parametrize("config", [AUTOENCODE, TOKENIZE, NEXT_SCALE, DECODE], ids=lambda c: c.kind)
def test_auto_is_what_the_device_multiplies_in_hardware(
    config: TaskConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under each answer the loss is bit for bit that of the dtype asked for by name."""
    batch = checks.samples()

    def loss(dtype: Any) -> Tensor:
        task = make(config, precision=PrecisionConfig(dtype=dtype))
        total: Tensor = task(batch, checks.draw_of(batch)).total.detach()
        return total

    named = {dtype: loss(dtype) for dtype in ("float32", "bfloat16")}
    assert not torch.equal(named["float32"], named["bfloat16"])
    for dtype, expected in named.items():
        monkeypatch.setattr(base_module, "pick_dtype", lambda device, dtype=dtype: getattr(torch, dtype))
        assert torch.equal(loss("auto"), expected)


def test_tokens_are_found_in_float32_under_autocast() -> None:
    """Those of the targets, and of the low-resolution image; in bfloat16 if that is asked for."""
    batch = checks.samples()
    found = {}
    for dtype, tokens in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        precision = PrecisionConfig(dtype=dtype, tokens=tokens)  # type: ignore[arg-type]
        task = make(NEXT_SCALE, mistakes=0.0, precision=precision)
        given = task.inputs(batch, checks.draw_of(batch), 0.0)  # type: ignore[attr-defined]
        found[dtype, tokens] = torch.cat([given.labels, given.rejected])
    assert torch.equal(found["float32", "float32"], found["bfloat16", "float32"])
    assert not torch.equal(found["float32", "float32"], found["bfloat16", "bfloat16"])


def test_the_lr_image_is_encoded_once_at_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the preference term its full encoding is the prefix too: no call more than the six maps need."""
    batch, sides = checks.samples(), []
    task = make(NEXT_SCALE)
    encoder = task.model.tokenizer.encoder
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda x: sides.append(x.shape[-1]) or forward(x))
    task(batch, checks.draw_of(batch))
    assert sorted(sides) == [8, 8, 16, 16, 32, 32]
    sides.clear()
    task.config = replace(task.config, preference=0.0)
    task(batch, checks.draw_of(batch))
    assert sorted(sides) == [8, 16, 32, 32]


SCALES = [(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16), (2, 4, 8), (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 24)]


@pytest.mark.parametrize("scales", SCALES, ids=len)
def test_the_number_of_scales_is_free(scales: tuple[int, ...]) -> None:
    """Eleven, three or thirteen; means and counts have a value a scale."""
    targets = (0.25, 0.5, 1.0)
    config = replace(CONFIG, tokenizer=replace(CONFIG.tokenizer, scales=scales, targets=targets))
    batch = checks.samples(side=config.tokenizer.image_size)
    pyramid = ScalePyramid(scales)
    for own in (TOKENIZE, NEXT_SCALE):
        losses = make(own, config)(batch, checks.draw_of(batch))
        assert losses.total.isfinite()
        for name in ("cross_entropy", "equal_tokens") if own is NEXT_SCALE else ():
            assert losses.means[name].shape == (len(scales),)
        if own is TOKENIZE:
            assert losses.counts["codes"].shape == (len(scales), 48)
            assert losses.counts["codes"].sum(1).tolist() == [BATCH * n for n in pyramid.lengths]


def test_counts_are_of_each_scales_codes() -> None:
    batch, task = checks.samples(), make(TOKENIZE)
    counts = task(batch, checks.draw_of(batch)).counts["codes"]
    tokens = task.model.tokenizer.tokenize(checks.images_of(batch)).indices
    for scale, part in enumerate(tokens.split(list(CONFIG.tokenizer.pyramid.lengths), 1)):
        assert torch.equal(counts[scale], part.flatten().bincount(minlength=48))


def test_means_of_next_scale_are_a_value_a_scale() -> None:
    """Cross entropy, gap and the share of tokens that the low-resolution image has too, by float64 sums."""
    batch = checks.samples()
    task = make(NEXT_SCALE, mistakes=0.0, class_dropout=0.0, drop_path=0.0, label_smoothing=0.0)
    means = task(batch, checks.draw_of(batch)).means
    with torch.no_grad():
        given = task.inputs(batch, checks.draw_of(batch), 0.0)  # type: ignore[attr-defined]
        logits = task.model.transformer(given.features, given.class_id, given.teacher).double()
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, given.labels[..., None])[..., 0]
    gap = chosen - log_probs.gather(-1, given.rejected[..., None])[..., 0]
    equal = (given.labels == given.rejected).double()
    assert 0 < equal.mean() < 1
    lengths = list(CONFIG.tokenizer.pyramid.lengths)
    for name, values in (("cross_entropy", -chosen), ("gap", gap), ("equal_tokens", equal)):
        expected = torch.stack([part.mean() for part in values.split(lengths, 1)])
        torch.testing.assert_close(means[name].double(), expected, **CLOSE)


def test_next_scale_is_evaluated_by_plain_cross_entropy() -> None:
    task = make(NEXT_SCALE)
    batches = [checks.samples(first) for first in (0, BATCH)]
    found = task.evaluate(batches, [checks.draw_of(batch) for batch in batches])
    losses, hits = [], []
    for batch in batches:
        with torch.no_grad():
            given = task.inputs(batch, checks.draw_of(batch), 0.0)  # type: ignore[attr-defined]
            logits = task.model.transformer(given.features, given.class_id, given.teacher).double()
        losses.append(-logits.log_softmax(-1).gather(-1, given.labels[..., None])[..., 0])
        hits.append((logits.argmax(-1) == given.labels).double())
    lengths = list(CONFIG.tokenizer.pyramid.lengths)
    for name, values in (("loss", torch.cat(losses)), ("accuracy", torch.cat(hits))):
        assert found[f"held_out_{name}"] == pytest.approx(values.mean().item(), rel=CLOSE["rtol"])
        for scale, part in enumerate(values.split(lengths, 1)):
            expected = pytest.approx(part.mean().item(), rel=CLOSE["rtol"])
            assert found[f"held_out_{name}_{scale}"] == expected
    assert "held_out_32_psnr_y" in found, "of what it predicts"


@pytest.mark.parametrize("config", EVERY[:-1], ids=lambda config: config.kind)
def test_artifact_evaluation_and_pictures(config: TaskConfig) -> None:
    """The artifact, in a fresh model of the same frozen parts, gives the pictures of the task."""
    task, batch = make(config), checks.samples()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.01)
    draw = checks.draw_of(batch)
    pictures, scores = task.pictures(batch, draw), task.evaluate([batch], [draw])
    assert [(name, picture.shape[-1]) for name, picture in pictures.items()] == [
        ("LR", 8), ("x1", 8), ("x2", 16), ("x4", 32), ("HR", 32)
    ]  # fmt: skip
    assert scores and all(isinstance(value, float) for value in scores.values())
    state = task.artifact()
    assert not any(value.requires_grad for value in state.values())
    other = make(config)
    missing, unexpected = other.model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not any(name.startswith(tuple(state)) for name in missing)
    assert other.evaluate([batch], [draw]) == scores
    if config in (AUTOENCODE, PLAIN):
        decoders = other.model.tokenizer.decoders
        for decoder in decoders[1:]:
            for a, b in zip(decoder.parameters(), decoders[0].parameters(), strict=True):
                assert torch.equal(a, b), "one decoder, for every target"


def test_autoencode_starts_from_the_principal_components() -> None:
    config = replace(CONFIG, tokenizer=replace(CONFIG.tokenizer, linear_skip=True))
    task, batches = make(AUTOENCODE, config), [checks.samples(first) for first in (0, BATCH)]
    before = task.evaluate(batches, [])["held_out_psnr_y"]
    found = task.start(iter(batches))
    assert 0 < found["linear_start_variance"] < 1
    assert task.evaluate(batches, [])["held_out_psnr_y"] > before + 3
    assert make(AUTOENCODE).start(iter(batches)) == {}


@pytest.mark.parametrize("hierarchical", [True, False])
def test_tokenize_starts_from_k_means(hierarchical: bool) -> None:
    """Of as many crops as are asked for; another seed gives other codes."""
    batches = [checks.samples(first) for first in (0, BATCH, 2 * BATCH)]
    books = []
    for seed in (0, 0, 1):
        task = make(TOKENIZE, hierarchical=hierarchical, codebook_images=BATCH + 2)
        given = iter(batches)
        assert task.start(given, seed)["codes_used"] > 0.8
        assert len(list(given)) == 1, "no more than it needs"
        books.append(task.model.tokenizer.quantize.codebook.detach().clone())
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])
    kept = make(TOKENIZE)
    before = kept.quantize.codebook.detach().clone()
    assert kept.start(iter(batches)) == {} and torch.equal(kept.quantize.codebook, before)


def test_next_scale_starts_its_classifier() -> None:
    kept, started, other = (make(NEXT_SCALE, head_from_codebook=on) for on in (False, True, True))
    before = started.transformer.head.weight.detach().clone()
    for task, seed in ((kept, 0), (started, 0), (other, 1)):
        task.start(iter([]), seed)
    assert torch.equal(kept.transformer.head.weight, before)
    assert not torch.equal(started.transformer.head.weight, before)
    assert not torch.equal(started.transformer.head.weight, other.transformer.head.weight)


def test_the_model_is_trained_in_place() -> None:
    """So that what is frozen sees what is trained: the sampler of an evaluation, the decoders of a grid."""
    for config in (AUTOENCODE, TOKENIZE, NEXT_SCALE, DECODE):
        task = make(config)
        ours = {id(p) for p in task.parameters()}
        assert ours <= {id(p) for p in task.model.parameters()}
    assert micro_model(CONFIG).config == CONFIG

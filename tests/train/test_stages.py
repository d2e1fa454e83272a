"""Each stage: its loss and gradient against the formula in float64, its optimisers, its dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.imaging.colour import wavelet_colour_fix
from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.train import stage as stage_module
from hitsr_fast.train.autoencoder import AutoencoderStage
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.config import (
    AutoencoderConfig,
    DecoderTrainConfig,
    Recipe,
    TokenizerTrainConfig,
    TransformerTrainConfig,
)
from hitsr_fast.train.decoder import DecoderStage
from hitsr_fast.train.recipe import pair_batches
from hitsr_fast.train.self_correction import code_neighbours, tokenize_with_mistakes
from hitsr_fast.train.stage import Stage
from hitsr_fast.train.tokenizer import TokenizerStage
from hitsr_fast.train.transformer import TransformerStage
from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES
from tests.train.photos import write_photos

CONFIG = replace(MICRO, tokenizer=replace(MICRO.tokenizer, decoder_lr=True))
STEP = 3
SQUARES = ReconstructionLossConfig(pixel="l2", alex=0.0, vgg=0.0)
AUTOENCODER = AutoencoderConfig(
    batch=4, loss=SQUARES, dtype="float32", lr=0.1, weight_decay=0.2, lr_share=0.5, latent_noise=0.4
)
TOKENIZER = TokenizerTrainConfig(
    batch=4,
    loss=SQUARES,
    dtype="float32",
    lr=0.1,
    weight_decay=0.2,
    codebook_lr=0.3,
    train_encoder=True,
    commitment=0.4,
    codebook_weight=0.7,
    continuous_prob=0.5,
)
TRANSFORMER = TransformerTrainConfig(
    batch=4,
    dtype="float32",
    lr=0.1,
    weight_decay=0.2,
    muon_lr=0.3,
    label_smoothing=0.1,
    scale_balance=0.75,
    mistakes=0.8,
    mistake_codes=8,
)
DECODER = DecoderTrainConfig(
    batch=4, loss=SQUARES, dtype="float32", lr=0.1, weight_decay=0.2, sampled=0.5, colour_fixed=0.5
)

Batches = tuple[PairBatches, PairBatches]


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    photos = write_photos(tmp_path_factory.mktemp("photos"))
    return pair_batches(Recipe(holdout=("held",), clean_prob=0.5), CONFIG, photos, "cpu")


def whole_model() -> HitVar:
    """With classes dropped in training, and codes as far from each other as the latents are."""
    model = micro_model(CONFIG).train()
    with torch.no_grad():
        model.tokenizer.quantize.codebook.mul_(3)
    return model


def double(module: nn.Module) -> Any:
    """A copy in float64 with gradients of its own."""
    copy = deepcopy(module).double()
    copy.zero_grad(set_to_none=True)
    return copy


def check(stage: Stage, exact: nn.Module, formula: Tensor) -> None:
    """The stage's loss is that of the formula, and so is the gradient of each weight of the model.

    exact: the stage's model in float64, of which `formula` was made.
    """
    stage.model.zero_grad(set_to_none=True)
    loss, _ = stage.loss(STEP)
    loss.backward()
    formula.backward()
    close = TOLERANCES["float32_training"]._asdict()
    torch.testing.assert_close(loss.detach().double(), formula.detach(), **close)
    largest = max(p.grad.abs().max() for p in exact.parameters() if p.grad is not None)
    for (name, found), expected in zip(stage.model.named_parameters(), exact.parameters(), strict=True):
        if expected.grad is None or not expected.grad.any():
            assert found.grad is None or not found.grad.any(), f"{name}: expected no gradient"
            continue
        assert found.grad is not None, f"{name}: expected a gradient"
        # A bias before a norm has a gradient of rounding errors alone.
        scale = expected.grad.abs().max().clamp_min(1e-3 * largest)
        torch.testing.assert_close(
            found.grad.double() / scale, expected.grad / scale, **close, msg=lambda m, n=name: f"{n}: {m}"
        )


def mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([*terms]).mean()


def squares(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def test_autoencoder_loss(batches: Batches) -> None:
    """Mean over the targets of |decode(z + noise) - image|^2; half of the images are enlarged LR ones."""
    stage = AutoencoderStage(whole_model().tokenizer, *batches, AUTOENCODER)
    exact = double(stage.model)
    hr, upsampled, _ = batches[0](STEP, 4)
    images = torch.cat([upsampled[:2], hr[2:]])
    generator = torch.Generator().manual_seed(STEP)
    terms = []
    for image in exact.pyramid(images.double()):
        z = exact.encode(image)
        strength = 0.4 * torch.rand(4, 1, 1, 1, generator=generator) * z.detach().std()
        noise = strength * torch.randn(z.shape, generator=generator)
        terms.append(squares(exact.decode(z + noise, 0), image))
    check(stage, exact, mean(terms))


@pytest.mark.parametrize("train_encoder", [True, False])
def test_tokenizer_loss(batches: Batches, train_encoder: bool) -> None:
    """Mean over the targets of |decode(seen) - image|^2 + 0.7 (|q - sg z|^2 + 0.4 |z - sg q|^2) / var z.

    The decoder sees q, or z for half of the samples; the encoder is trained through both, or not at all.
    """
    config = replace(TOKENIZER, train_encoder=train_encoder)
    stage = TokenizerStage(whole_model().tokenizer, *batches, config)
    exact = double(stage.model)
    images = batches[0].hr(STEP, 4)
    with torch.no_grad():
        tokens = stage.model.tokenize(images).indices  # type: ignore[operator]
    generator = torch.Generator().manual_seed(STEP)
    terms = []
    for target, image in enumerate(exact.pyramid(images.double())):
        z = exact.encode(image)
        q = exact.quantize.decode(tokens, target).reconstruction
        latent_loss = squares(q, z.detach())
        if train_encoder:
            latent_loss = latent_loss + 0.4 * squares(z, q.detach())
        continuous = torch.rand(4, 1, 1, 1, generator=generator) < 0.5
        seen = torch.where(continuous, z, z + (q - z).detach())
        terms.append(squares(exact.decode(seen, target), image) + 0.7 * latent_loss / z.detach().var())
    check(stage, exact, mean(terms))


@pytest.mark.parametrize("mistakes", [0.0, 0.8])
def test_transformer_loss(batches: Batches, mistakes: float) -> None:
    """Mean over tokens of w CE(logits(tokens with mistakes), labels), w like L^-0.75 at L tokens a scale."""
    whole = whole_model()
    config = replace(TRANSFORMER, mistakes=mistakes)
    stage = TransformerStage(whole.transformer, whole.tokenizer, *batches, config)
    exact = double(stage.model)
    tokenizer = whole.tokenizer
    hr, upsampled, class_id = batches[0](STEP, 4)
    with torch.no_grad():
        features = tokenizer.encode(upsampled)
        latents = [tokenizer.encode(level) for level in tokenizer.pyramid(hr)]
    neighbours = code_neighbours(tokenizer.quantize.codebook, 8)
    generator = torch.Generator().manual_seed(STEP)
    labels, tokens = tokenize_with_mistakes(tokenizer.quantize, latents, neighbours, mistakes, generator)
    assert torch.equal(labels, tokens) == (mistakes == 0)
    inputs = double(tokenizer.quantize).teacher_inputs(tokens)
    torch.manual_seed(STEP)
    log_probs = exact(features.double(), class_id, inputs).double().log_softmax(-1)
    codes = log_probs.shape[-1]
    wanted = 0.9 * F.one_hot(labels, codes) + 0.1 / codes
    lengths = torch.tensor([side * side for side in CONFIG.tokenizer.scales]).double()
    weights = lengths.pow(-0.75).repeat_interleave(lengths.long())
    entropy = -(wanted * log_probs).sum(-1)
    check(stage, exact, (weights * entropy).sum() / weights.sum() / 4)


def test_transformer_is_evaluated_by_plain_cross_entropy(batches: Batches) -> None:
    whole = whole_model()
    stage = TransformerStage(whole.transformer, whole.tokenizer, *batches, TRANSFORMER)
    model = whole.transformer.eval()
    with torch.no_grad():
        found = stage.evaluate(model)
        losses, hits = [], []
        for i in range(4):
            hr, upsampled, class_id = batches[1](i, 8)
            labels = whole.tokenizer.tokenize(hr).indices
            features = whole.tokenizer.encode(upsampled)
            logits = model(features, class_id, whole.tokenizer.quantize.teacher_inputs(labels))
            losses.append(-logits.double().log_softmax(-1).gather(-1, labels[..., None]).mean())
            hits.append((logits.argmax(-1) == labels).double().mean())
    expected = {"held_out_loss": mean(losses).item(), "held_out_accuracy": mean(hits).item()}
    assert found == pytest.approx(expected, rel=TOLERANCES["float32_training"].rtol)


@pytest.mark.parametrize("top_k", [1, 0])
def test_decoder_loss(batches: Batches, top_k: int) -> None:
    """Mean over the targets of |output - image|^2.

    Half of the outputs are of tokens sampled from the LR images, half of the images' own tokens; about half
    have passed the colour fix.
    """
    whole = whole_model()
    stage = DecoderStage(whole, *batches, replace(DECODER, top_k=top_k))
    exact = double(whole)
    images, lr, class_id = batches[0].pairs(STEP, 4)
    with torch.no_grad():
        features, draws = whole.lr_features(lr[:2]), torch.Generator().manual_seed(STEP)
        options = SamplingOptions(top_k=top_k)
        sampled, _ = HitSampler(whole).sample(features, class_id[:2], options, generator=draws)
        greedy, _ = HitSampler(whole).sample(features, class_id[:2])
        assert torch.equal(sampled, greedy) == (top_k == 1)
        own = whole.tokenizer.tokenize(images).indices[2:]
    images, lr = images.double(), lr.double()
    tokenizer = exact.tokenizer
    generator = torch.Generator().manual_seed(STEP)
    terms = []
    for target, image in enumerate(tokenizer.pyramid(images)):
        seen = [tokenizer.quantize.decode(tokens, target).reconstruction for tokens in (sampled, own)]
        outputs = torch.cat(
            [
                tokenizer.decode(seen[0], target, exact.lr_image(lr[:2], target)),
                tokenizer.decode(seen[1], target),
            ]
        )
        source = F.interpolate(lr, size=image.shape[-2:], mode="bicubic", align_corners=False)
        fixed = wavelet_colour_fix(outputs, source, CONFIG.colour_fix_levels[target])
        chosen = torch.rand(4, 1, 1, 1, generator=generator) < 0.5
        terms.append(squares(torch.where(chosen, fixed, outputs), image))
    check(stage, tokenizer, mean(terms))


MakeStage = Callable[..., Stage]


def autoencoder(batches: Batches, **changes: Any) -> Stage:
    return AutoencoderStage(whole_model().tokenizer, *batches, replace(AUTOENCODER, **changes))


def tokenizer(batches: Batches, **changes: Any) -> Stage:
    return TokenizerStage(whole_model().tokenizer, *batches, replace(TOKENIZER, **changes))


def transformer(batches: Batches, **changes: Any) -> Stage:
    whole = whole_model()
    return TransformerStage(whole.transformer, whole.tokenizer, *batches, replace(TRANSFORMER, **changes))


def decoder(batches: Batches, **changes: Any) -> Stage:
    return DecoderStage(whole_model(), *batches, replace(DECODER, **changes))


STAGES = [autoencoder, tokenizer, transformer, decoder]
ADAM, MUON = torch.optim.AdamW, torch.optim.Muon
BLOCK_MATRICES = ("mat_qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")


def tokenizer_rule(*trained: str) -> Callable[[str], object]:
    """AdamW at 0.1 with decay on the parts named; codebook and phi, if named, at 0.3 without."""

    def rule(name: str) -> object:
        if not name.startswith(trained):
            return None
        return (ADAM, 0.3, 0.0) if name.startswith("quantize.") else (ADAM, 0.1, 0.2)

    return rule


def transformer_rule(name: str) -> object:
    """Muon on the blocks' matrices, AdamW on the rest, of which only the modulations and the head decay."""
    if name.startswith("blocks.") and name.endswith(BLOCK_MATRICES):
        return (MUON, 0.3, 0.2)
    return (ADAM, 0.1, 0.2 if name.endswith(("ada_lin.1.weight", "head.weight")) else 0.0)


def adam_rule(name: str) -> object:
    """The same without Muon."""
    return (ADAM, 0.1, 0.2) if name.endswith(BLOCK_MATRICES) else transformer_rule(name)


@pytest.mark.parametrize(
    ("make", "changes", "rule"),
    [
        (autoencoder, {}, tokenizer_rule("encoder.", "quant_conv.", "decoders.0.")),
        (tokenizer, {}, tokenizer_rule("encoder.", "quant_conv.", "decoders.", "quantize.")),
        (tokenizer, {"train_encoder": False}, tokenizer_rule("decoders.", "quantize.")),
        (transformer, {}, transformer_rule),
        (transformer, {"muon_lr": 0.0}, adam_rule),
        (decoder, {}, tokenizer_rule("decoders.")),
    ],
)
def test_each_weight_has_its_optimiser(
    batches: Batches, make: MakeStage, changes: dict[str, Any], rule: Callable[[str], object]
) -> None:
    stage = make(batches, **changes)
    found: dict[Tensor, object] = {}
    for optimizer in stage.optimizers():
        for group in optimizer.param_groups:
            assert group.get("betas", (0.9, 0.95)) == (0.9, 0.95)
            for parameter in group["params"]:
                assert parameter not in found, "in two groups"
                found[parameter] = (type(optimizer), group["lr"], group["weight_decay"])
    names = [name for name, _ in stage.model.named_parameters()]
    assert {name: found.get(p) for name, p in stage.model.named_parameters()} == {n: rule(n) for n in names}


@pytest.mark.parametrize("make", STAGES)
def test_auto_is_what_the_device_multiplies_in_hardware(
    batches: Batches, make: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under each answer the loss is bit for bit that of the dtype asked for by name."""
    named = {dtype: make(batches, dtype=dtype).loss(STEP)[0] for dtype in ("float32", "bfloat16")}
    assert not torch.equal(named["float32"], named["bfloat16"])
    for dtype, expected in named.items():
        monkeypatch.setattr(stage_module, "pick_dtype", lambda device, dtype=dtype: getattr(torch, dtype))
        assert torch.equal(make(batches, dtype="auto").loss(STEP)[0], expected)


def test_the_decoders_sampler_has_the_stages_dtype(batches: Batches) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        stage = decoder(batches, dtype=str(dtype).removeprefix("torch."))
        assert isinstance(stage, DecoderStage) and stage.sampler.body_dtype == dtype

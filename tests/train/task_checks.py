"""Each task's loss and gradients against its formula in float64, as functions that tests call.

The formulas draw as the tasks do, by the names of the streams: a draw is part of what a seed stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.imaging.colour import wavelet_colour_fix
from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.train.config import (
    AutoencodeConfig,
    DataConfig,
    DecodeConfig,
    NextScaleConfig,
    OptimConfig,
    Phase,
    PrecisionConfig,
    TaskConfig,
    TokenizeConfig,
)
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.pairs import lr_pairs
from hitsr_fast.train.self_correction import code_neighbours, tokenize_with_mistakes
from hitsr_fast.train.task import Batch, images_of
from hitsr_fast.train.tasks import TASKS, HitTask
from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES

CONFIG = replace(MICRO, tokenizer=replace(MICRO.tokenizer, decoder_lr=True))
DATA = DataConfig(clean_prob=0.5)
CLOSE = TOLERANCES["float32_training"]._asdict()
SQUARES = ReconstructionLossConfig(pixel="l2", alex=0.0, vgg=0.0)
OPTIM = OptimConfig(lr=0.1, weight_decay=0.2, muon_lr=0.3, quantizer_lr=0.4)
AUTOENCODE = AutoencodeConfig(loss=SQUARES, lr_share=0.5, latent_noise=0.4)
TOKENIZE = TokenizeConfig(
    loss=SQUARES, train="all", commitment=0.4, codebook_weight=0.7, continuous_prob=0.5, codebook_images=0
)
NEXT_SCALE = NextScaleConfig(
    label_smoothing=0.1,
    preference=0.6,
    preference_beta=0.5,
    class_dropout=0.5,
    drop_path=0.4,
    scale_balance=0.75,
    mistakes=0.8,
    mistake_codes=8,
)
DECODE = DecodeConfig(loss=SQUARES, sampled=0.5, colour_fixed=0.5)
BATCH = 6  # of which the drawn shares hit some and miss some


def whole_model(config: Any = CONFIG) -> HitVar:
    """With codes as far from each other as the latents are."""
    model = micro_model(config).train()
    with torch.no_grad():
        model.tokenizer.quantize.codebook.mul_(3)
    return model


def make(task: TaskConfig, config: Any = CONFIG, **changes: Any) -> HitTask:
    """A task on a micro model in float32; `changes` are of its configuration, or of its phase."""
    own = {k: v for k, v in changes.items() if hasattr(task, k)}
    values: dict[str, Any] = {"optim": OPTIM, "precision": PrecisionConfig(dtype="float32"), "batch": BATCH}
    values |= {k: v for k, v in changes.items() if k not in own}
    phase = Phase(name="phase", task=replace(task, **own), **values)
    made = TASKS[task.kind](whole_model(config), phase, DATA, "cpu")
    made.train()
    return made


def samples(first: int = 2 * BATCH, count: int = BATCH, side: int = CONFIG.tokenizer.image_size) -> Batch:
    """Coloured blobs, each a function of its global index."""
    images = []
    for index in range(first, first + count):
        generator = torch.Generator().manual_seed(index)
        coarse = torch.rand(1, 3, 5, 5, generator=generator)
        fine = torch.rand(1, 3, side, side, generator=generator)
        image = 0.8 * F.interpolate(coarse, (side, side), mode="bilinear") + 0.2 * fine
        images.append((image * 255).to(torch.uint8))
    return Batch(torch.cat(images), torch.arange(first, first + count))


def _enlarged(lr: Tensor, side: int) -> Tensor:
    return F.interpolate(lr, (side, side), mode="bilinear", antialias=True, align_corners=False)


def draw_of(batch: Batch, seed: int = 0) -> Draw:
    return Draw(seed, "phase", batch.index, "cpu")


def mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([*terms]).mean()


def squares(a: Tensor, b: Tensor) -> Tensor:
    """Of each sample."""
    return (a - b).square().mean((1, 2, 3))


def rows_of(draw: Draw, stream: str, share: float) -> list[bool]:
    """Which samples a share hits."""
    return [seed < share * 2**63 for seed in draw.seeds(stream)]


def exact_model(task: HitTask) -> HitVar:
    """A copy in float64 with gradients of its own."""
    copy = deepcopy(task.model).double()
    copy.zero_grad(set_to_none=True)
    return copy.requires_grad_(True)


def check(task: HitTask, exact: HitVar, formula: Tensor, *, seed: int = 0) -> None:
    """The task's loss is that of the formula, and so is the gradient of each weight that it trains.

    exact: the model in float64, of which `formula` was made.
    """
    batch = samples()
    task.zero_grad(set_to_none=True)
    found = task(batch, draw_of(batch, seed)).total
    found.backward()
    formula.backward()
    torch.testing.assert_close(found.detach().double(), formula.detach(), **CLOSE)
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    largest = max(p.grad.abs().max() for p in exact.parameters() if p.grad is not None)
    for (name, p), q in zip(task.model.named_parameters(), exact.named_parameters(), strict=True):
        expected = q[1].grad
        if name not in trained:
            assert p.grad is None, f"{name}: expected no gradient"
            continue
        assert p.grad is not None, f"{name}: expected a gradient"
        if expected is None or not expected.any():
            assert not p.grad.any(), f"{name}: expected a gradient of zeros"
            continue
        # A bias before a norm has a gradient of rounding errors alone.
        scale = expected.abs().max().clamp_min(1e-3 * largest)
        torch.testing.assert_close(
            p.grad.double() / scale, expected / scale, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_autoencode() -> None:
    """Mean over the targets of |decode(z + noise) - image|^2; some of the images are enlarged LR ones."""
    task = make(AUTOENCODE)
    exact = exact_model(task).tokenizer
    batch = samples()
    draw = draw_of(batch)
    images = images_of(batch)
    low = rows_of(draw, "lr_share", 0.5)
    assert any(low) and not all(low)
    for row in [row for row, is_low in enumerate(low) if is_low]:
        lr, _ = lr_pairs(images[row : row + 1], draw[row : row + 1], DATA)
        images[row] = _enlarged(lr, images.shape[-1])[0]
    terms = []
    for image in exact.pyramid(images.double()):
        z, side = exact.encode(image), image.shape[-1]
        deviation = torch.stack([one.std() for one in z.detach()])[:, None, None, None]
        strength = 0.4 * draw.uniform(f"noise_strength/{side}", 1, 1, 1) * deviation
        noise = strength * draw.normal(f"noise/{side}", *z.shape[1:])
        terms.append(squares(exact.decode(z + noise, 0), image))
    check(task, *_of_whole(task, exact), mean(terms))


def _of_whole(task: HitTask, tokenizer: Any) -> tuple[HitVar]:
    """A model whose tokenizer is the one given; the rest has no gradient."""
    whole = deepcopy(task.model).double()
    whole.zero_grad(set_to_none=True)
    whole.tokenizer = tokenizer
    return (whole,)


def check_tokenize(train: str, *, hierarchical: bool = True, targets: str = "mean") -> None:
    """Over the targets |decode(seen) - image|^2 + 0.7 (|q - sg z|^2 + 0.4 |z - sg q|^2) / var z.

    The decoder sees q, or z for half of the samples; the encoder is trained through both, or not at all.
    """
    loss = replace(SQUARES, targets=targets)
    task = make(TOKENIZE, train=train, hierarchical=hierarchical, loss=loss)
    exact = exact_model(task)
    tokenizer = exact.tokenizer
    batch = samples()
    images, draw = images_of(batch), draw_of(batch)
    with torch.no_grad():
        own = task.model.tokenizer
        if hierarchical:
            tokens = own.tokenize(images).indices
        else:
            tokens = own.quantize.quantize(own.encode(images)).indices
    terms = []
    for target, image in enumerate(tokenizer.pyramid(images.double())):
        if not hierarchical and target < 2:
            continue
        with torch.set_grad_enabled(train == "all"):
            z = tokenizer.encode(image)
        q = tokenizer.quantize.decode(tokens, target).reconstruction
        latent_loss = squares(q, z.detach())
        if train == "all":
            latent_loss = latent_loss + 0.4 * squares(z, q.detach())
        variance = torch.stack([one.var() for one in z.detach()])
        assert variance.min() > 0.01
        continuous = draw.uniform(f"continuous/{target}", 1, 1, 1) < 0.5
        seen = torch.where(continuous, z, z + (q - z).detach())
        image_loss = squares(tokenizer.decode(seen, target), image)
        term = 0.7 * latent_loss / variance
        terms.append(term if train == "quantizer" else term + image_loss)
    total = torch.stack(terms)
    check(task, exact, (total.mean(0) if targets == "mean" else total.sum(0)).mean())


def check_next_scale(seed: int = 0, **changes: Any) -> None:
    """Mean over tokens of w CE, w like L^-0.75 at L tokens a scale, plus 0.6 softplus(-0.5 mean gap)."""
    task = make(NEXT_SCALE, **changes)
    config: Any = task.phase.task
    exact = exact_model(task)
    tokenizer = task.model.tokenizer
    batch = samples()
    draw = draw_of(batch, seed)
    hr = images_of(batch)
    lr, class_id = lr_pairs(hr, draw, DATA)
    upsampled = _enlarged(lr, hr.shape[-1])
    with torch.no_grad():
        latents, low = ([tokenizer.encode(x) for x in tokenizer.pyramid(i)] for i in (hr, upsampled))
    if config.hierarchical:
        rejected = tokenizer.quantize.tokenize(low).indices
        plain = tokenizer.quantize.tokenize(latents).indices
    else:
        latents, low = latents[-1:], low[-1:]
        rejected = tokenizer.quantize.quantize(low[0]).indices
        plain = tokenizer.quantize.quantize(latents[0]).indices
    labels = tokens = plain
    if config.mistakes > 0:
        neighbours = code_neighbours(tokenizer.quantize.codebook, 8)
        labels, tokens = tokenize_with_mistakes(
            tokenizer.quantize, latents, neighbours, 0.8, draw, hierarchical=config.hierarchical
        )
        assert not torch.equal(labels, tokens)
    inputs = deepcopy(tokenizer.quantize).double().teacher_inputs(tokens)
    dropped = draw.uniform("class_dropout") < 0.5
    assert dropped.any() and not dropped.all()
    seen_class = torch.where(dropped, 2, class_id)
    keep = (draw.uniform("drop_path", 2, 2).double() < torch.tensor([1.0, 0.6])[:, None]).double()
    keep = (keep / torch.tensor([1.0, 0.6]).double()[:, None]).permute(1, 2, 0)
    logits = exact.transformer.head(exact.transformer.hidden(low[-1].double(), seen_class, inputs, keep=keep))
    log_probs = logits.log_softmax(-1)
    codes = log_probs.shape[-1]
    wanted = 0.9 * F.one_hot(labels, codes) + 0.1 / codes
    lengths = torch.tensor(task.model.config.tokenizer.pyramid.lengths).double()
    weights = lengths.pow(-0.75).repeat_interleave(lengths.long())
    loss = (weights * -(wanted * log_probs).sum(-1)).sum(1) / weights.sum()
    gap = (log_probs.gather(-1, labels[..., None]) - log_probs.gather(-1, rejected[..., None]))[..., 0]
    gap = gap.mean(1) if config.preference_reduction == "mean" else gap.sum(1)
    term = -torch.sigmoid(0.5 * gap).log()
    if config.preference_classes is not None:
        term = term * torch.isin(class_id, torch.tensor(config.preference_classes))
    check(task, exact, (loss + config.preference * term).mean(), seed=seed)


def check_decode(top_k: int = 1) -> None:
    """Mean over the targets of |output - image|^2.

    Some of the outputs are of tokens sampled from the LR images, the others of the images' own tokens; some
    have passed the colour fix.
    """
    task = make(DECODE, top_k=top_k)
    whole = task.model
    exact = exact_model(task)
    batch = samples()
    draw = draw_of(batch)
    images = images_of(batch)
    lr, class_id = lr_pairs(images, draw, DATA)
    sampled = rows_of(draw, "sampled", 0.5)
    assert any(sampled) and not all(sampled)
    chosen = [row for row, is_sampled in enumerate(sampled) if is_sampled]
    seeds = [draw[chosen].seeds("tokens")[chosen.index(row)] if row in chosen else 0 for row in range(BATCH)]
    terms = []
    for row in range(BATCH):
        own = slice(row, row + 1)
        with torch.no_grad():
            if sampled[row]:
                options = SamplingOptions(top_k=top_k, seed=seeds[row])
                tokens, _ = HitSampler(whole).sample(whole.lr_features(lr[own]), class_id[own], options)
            else:
                tokens = whole.tokenizer.tokenize(images[own]).indices
        for target, image in enumerate(exact.tokenizer.pyramid(images[own].double())):
            q = exact.tokenizer.quantize.decode(tokens, target).reconstruction.detach()
            seen = exact.lr_image(lr[own].double(), target) if sampled[row] else None
            output = exact.tokenizer.decode(q, target, seen)
            source = F.interpolate(lr[own].double(), image.shape[-2:], mode="bicubic", align_corners=False)
            fixed = wavelet_colour_fix(output, source, CONFIG.colour_fix_levels[target])
            is_fixed = draw[own].uniform(f"colour_fixed/{target}", 1, 1, 1) < 0.5
            terms.append(squares(torch.where(is_fixed, fixed, output), image)[0])
    check(task, exact, mean(terms))


def check_optimizers(task: TaskConfig, **changes: Any) -> dict[str, object]:
    """Each trained parameter is in one group; returns (group, optimiser, rate, decay) by name."""
    made = make(task, **changes)
    found: dict[str, object] = {}
    for group in made.groups():
        for name in group.names:
            assert name not in found, f"{name}: in two groups"
            found[name] = (group.name, group.optimizer, group.lr, group.weight_decay)
    assert found.keys() == {name for name, p in made.named_parameters() if p.requires_grad}
    return found

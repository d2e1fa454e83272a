"""What the tasks of HIT-VAR have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.models.hit_var.tokenizer import enlarged
from hitsr_fast.nn.decay import weight_decay_groups
from hitsr_fast.pipeline import pick_dtype
from hitsr_fast.precision import exact_float32
from hitsr_fast.train.config import DataConfig, Phase
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.pairs import lr_pairs, targets
from hitsr_fast.train.task import Batch, Frozen, Group, Task, images_of


class HitTask(Task):
    """A task on a part of a `HitVar`.

    Args:
        model: Whose part is trained, in place; the rest is frozen.
        phase: With the task's own configuration.
        data: How low-resolution images are made.
        device: Where it runs; the model is brought there.
    """

    parts: ClassVar[Mapping[str, str]]
    """The group of each registered module that may be trained."""

    def __init__(
        self, model: HitVar, phase: Phase, data: DataConfig, device: torch.device | str, **frozen: nn.Module
    ) -> None:
        super().__init__()
        self.phase, self.data, self.device = phase, data, torch.device(device)
        self.dtype = (
            pick_dtype(self.device)
            if phase.precision.dtype == "auto"
            else cast(torch.dtype, getattr(torch, phase.precision.dtype))
        )
        model.to(self.device)
        for part in (model.tokenizer.encoder, model.tokenizer.quant_conv, model.tokenizer.decoders):
            part.to(memory_format=torch.channels_last)
        self.frozen = Frozen(model=model, **{name: module.to(self.device) for name, module in frozen.items()})

    @property
    def model(self) -> HitVar:
        """The whole model, with the trained part in it."""
        return cast(HitVar, self.frozen.model)

    def autocast(self) -> torch.autocast:
        """Context in which convolutions and matrices are multiplied in the phase's dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def token_precision(self) -> Iterator[None]:
        """Context in which the tokens of the targets are found: float32 as it is written, or bfloat16."""
        if self.phase.precision.tokens == "bfloat16":
            with torch.autocast(self.device.type, torch.bfloat16):
                yield
        else:
            with torch.autocast(self.device.type, enabled=False), exact_float32():
                yield

    def levels(self, images: Tensor) -> list[Tensor]:
        """Images `(B, 3, S, S)` at each target size, as the convolutions like them."""
        pyramid = self.model.tokenizer.pyramid(images)
        return [level.contiguous(memory_format=torch.channels_last) for level in pyramid]

    @torch.no_grad()
    def latents(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """What a frozen encoder makes of images, for tokens: float32 `(B, C, h, w)` each."""
        with self.token_precision():
            return [self.model.tokenizer.encode(level).float() for level in levels]

    @torch.no_grad()
    def images(self, batch: Batch) -> Tensor:
        """HR images as targets (`pairs.targets`)."""
        return targets(images_of(batch), self.data)

    @torch.no_grad()
    def pairs(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """HR images as targets, their low-resolution versions and classes."""
        images = images_of(batch)
        return targets(images, self.data), *lr_pairs(images, draw, self.data)

    @torch.no_grad()
    def upsampled(self, lr: Tensor) -> Tensor:
        """LR images `(B, 3, h, w)` at the full side, as the convolutions like them."""
        up = enlarged(lr, self.model.config.tokenizer, -1)
        return up.contiguous(memory_format=torch.channels_last)

    @property
    def sides(self) -> list[int]:
        """Of the image of each target, in pixels."""
        config = self.model.config.tokenizer
        return [size * config.stride for size in config.target_sizes]

    def decoded_samples(self, sampler: HitSampler, lr: Tensor, class_id: Tensor) -> list[Tensor]:
        """Images `(B, 3, side, side)`, one a target, that greedy codes for LR tiles decode to."""
        with torch.no_grad(), self.autocast():
            _, latents = sampler.sample(self.model.lr_features(lr), class_id)
            return [self.model.decode(latents, target, lr).float() for target in range(len(latents))]

    def without_lr(self, decoders: nn.ModuleList) -> nn.ModuleList:
        """Decoders to train on latents alone: what acts on the LR image waits for a later phase."""
        decoders.requires_grad_(True)
        for parameter in self.lr_parameters(decoders):
            parameter.requires_grad_(False)
        return decoders

    def lr_parameters(self, decoders: nn.ModuleList) -> list[nn.Parameter]:
        """Those of decoders that only act on a LR image (`TokenizerConfig.decoder_lr`)."""
        ways = [way for decoder in decoders for way in (decoder.lr_in, decoder.lr_out) if way is not None]
        return [parameter for way in ways for parameter in cast(nn.Module, way).parameters()]

    def step_of(self, draw: Draw) -> int:
        """The step whose samples a draw is for."""
        return int(draw.index[0]) // self.phase.batch

    def groups(self) -> list[Group]:
        """By part; Muon, where it has a rate, takes the blocks' matrices; codebook and phi have their own."""
        optim = self.phase.optim
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        decayed, plain = ([n for n in names if n in trained] for names in weight_decay_groups(self))
        found: list[Group] = []
        for group in dict.fromkeys(self.parts.values()):
            prefixes = tuple(f"{part}." for part, own in self.parts.items() if own == group)
            matrices, vectors = ([n for n in names if n.startswith(prefixes)] for names in (decayed, plain))
            lr, decay = optim.lr, optim.weight_decay
            if group == "quantizer":
                matrices, vectors, lr = [], matrices + vectors, self.quantizer_lr
            if optim.muon_lr > 0:
                muon = [n for n in matrices if self._is_block_matrix(n)]
                matrices = [n for n in matrices if n not in muon]
                found.append(Group(group, muon, "muon", optim.muon_lr, decay))
            found += [Group(group, matrices, "adamw", lr, decay), Group(group, vectors, "adamw", lr, 0.0)]
        return [group for group in found if group.names]

    @property
    def quantizer_lr(self) -> float:
        """Peak rate of codebook and phi."""
        rate = self.phase.optim.quantizer_lr
        return self.phase.optim.lr if rate is None else rate

    def _is_block_matrix(self, name: str) -> bool:
        """Whether Muon takes it: a matrix of the blocks, but none of the modulations' stacked ones."""
        return ".blocks." in name and ".ada_lin." not in name and self.get_parameter(name).ndim == 2

    def state_of(self, *prefixes: str) -> dict[str, Tensor]:
        """The part of the whole model's state dict under some prefixes."""
        state = self.model.state_dict()
        return {name: value.detach() for name, value in state.items() if name.startswith(prefixes)}

    def shared_decoder(self, state: dict[str, Tensor], source: int) -> dict[str, Tensor]:
        """A state in which every target's decoder is that of target number `source`."""
        prefix = f"tokenizer.decoders.{source}."
        own = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        count = len(self.model.config.tokenizer.targets)
        copies = {f"tokenizer.decoders.{i}.{name}": v for i in range(count) for name, v in own.items()}
        return {**state, **copies}

    def grid(self, images: Tensor, lr: Tensor, outputs: Iterable[Tensor]) -> dict[str, Tensor]:
        """Columns of an image grid: LR, one a target, HR."""
        factors = self.model.config.scale_factors
        made = {f"x{factor}": output.float() for factor, output in zip(factors, outputs, strict=True)}
        return {"LR": lr, **made, "HR": images}

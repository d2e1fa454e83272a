"""A task that takes milliseconds, with stand-ins of the data and the log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.train.checkpoint import Checkpoints
from hitsr_fast.train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    Phase,
    PrecisionConfig,
    ScheduleConfig,
)
from hitsr_fast.train.data import IndexSampler, Loader
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.parallel import Parallel
from hitsr_fast.train.task import Batch, Frozen, Group, Losses, Task, images_of
from hitsr_fast.train.trainer import fit

SIDE, WIDTH, CODES = 4, 7, 5  # 7 and 5 rows are uneven over 2 and 4 processes


class Block(nn.Module):
    """A residual one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Toy(Task):
    """Regression of a frozen projection of the images: embedding, blocks, a matrix that is not trained."""

    def __init__(self, phase: Phase, *, bad: tuple[int, int] = (0, 0), device: str = "cpu") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embedding = nn.Embedding(CODES, WIDTH)
            self.enter = nn.Linear(3 * SIDE * SIDE, WIDTH)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.still = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
            self.frozen = Frozen(teacher=nn.Linear(3 * SIDE * SIDE, WIDTH))
        self.phase, self.bad = phase, bad
        self.seen: list[list[int]] = []  # indices of the micro-batches trained on
        self.register_buffer("shift", torch.zeros(WIDTH))
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))  # steps
        self.to(device)
        self.frozen.teacher.to(device)

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def groups(self) -> list[Group]:
        optim = self.phase.optim
        blocks = [n for n, p in self.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
        rest = [n for n, p in self.named_parameters() if p.requires_grad and n not in blocks]
        kind = "muon" if optim.muon_lr else "adamw"
        return [
            Group("blocks", blocks, kind, optim.muon_lr or optim.lr, optim.weight_decay),
            Group("rest", rest, "adamw", optim.lr, 0.0),
        ]

    def start(self, batches: Iterable[Batch], seed: int = 0) -> dict[str, float]:
        images: list[Tensor] = []
        for batch in batches:  # of a size that the number of processes decides
            images += images_of(batch).unbind()
            if len(images) >= 8:
                break
        mean = torch.stack(images[:8]).mean()
        self.shift.fill_(mean)
        return {"mean": float(mean), "seed": seed}

    def after_step(self, step: int) -> None:
        self.done += 1

    def forward(self, batch: Batch, draw: Draw) -> Losses:
        if self.training:
            self.seen.append(batch.index.tolist())
        pixels = images_of(batch).flatten(1)
        codes = draw.integers("codes", CODES)
        device = pixels.device.type
        dtype = getattr(torch, self.phase.precision.dtype, torch.float32)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            hidden = self.enter(pixels) + self.embedding(codes) + self.shift
            for block in self.blocks:
                hidden = block(hidden)
            hidden = self.still(hidden)
        loss = F.mse_loss(hidden.float(), self.frozen.teacher(pixels), reduction="none").mean(1)
        steps = torch.div(batch.index, self.phase.batch, rounding_mode="floor")
        spoiled = (steps >= self.bad[0]) & (steps < self.bad[1])
        spoiled &= self.training & (batch.index % self.phase.batch == 1)  # a sample of one process
        loss = torch.where(spoiled.to(loss.device), torch.inf, 1.0) * loss
        counts = F.one_hot(codes, CODES).sum(0)[None]
        return Losses(loss.mean(), {"rows": loss.detach().mean()[None].expand(2)}, {"codes": counts})

    def evaluate(self, batches: Iterable[Batch], draws: Iterable[Draw]) -> dict[str, float]:
        totals = [self(batch, draw).total for batch, draw in zip(batches, draws, strict=True)]
        return {"held_out_loss": float(torch.stack(totals).mean())}

    def pictures(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        return {"HR": images_of(batch)}

    def artifact(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}


class Pixels:
    """A `Source` of noise."""

    digest, side = "noise", SIDE

    def __init__(self, seed: int | None = None) -> None:
        self.skipped: dict[str, str] = {}
        self.seed = seed  # in place of the run's

    def newly_skipped(self) -> dict[str, str]:
        return {}

    def crop(self, seed: int, phase: str, index: int, size: int) -> Tensor:
        seed = seed if self.seed is None else self.seed
        values = Draw(seed, phase, torch.tensor([index]), "cpu").integers("pixels", 256, 3, size, size)
        return values[0].to(torch.uint8)


class Lines:
    """A `Log` that keeps what it is told."""

    def __init__(self, config: LogConfig | None = None) -> None:
        self.config = config or LogConfig(every=3)
        self.steps: list[tuple[int, dict[str, Any]]] = []
        self.lines: list[dict[str, Any]] = []
        self.pictures: list[int] = []
        self.codes: list[list[int]] = []

    def step(
        self,
        step: int,
        means: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
        *,
        lr: float,
        waited: float,
    ) -> None:
        self.steps.append((step, {"lr": lr, "waited": waited, **{n: v.tolist() for n, v in means.items()}}))
        self.codes += [count.flatten().tolist() for count in counts.values()]

    def line(self, kind: str, **values: Any) -> None:
        self.lines.append({"kind": kind, **values})

    def images(self, step: int, columns: Mapping[str, Tensor]) -> None:
        self.pictures.append(step)

    def restart_clock(self) -> None:
        pass

    @property
    def losses(self) -> list[float]:
        return [values["loss"] for _, values in self.steps]


def toy_phase(
    steps: int = 6,
    *,
    batch: int = 8,
    strategy: str = "ddp",
    muon: float = 0.02,
    ema: float = 0.9,
    dtype: str = "float32",
    **parallel: Any,
) -> Phase:
    """A short phase with all that there is."""
    return Phase(
        name="toy",
        batch=batch,
        optim=OptimConfig(lr=1e-2, muon_lr=muon, ema=ema, weight_decay=0.1, clip=0.5),
        schedule=ScheduleConfig(steps=steps, warmup=0.2, warmup_from=0.1),
        precision=PrecisionConfig(dtype=dtype),
        parallel=ParallelConfig(strategy=strategy, **parallel),
    )


def train_toy(
    folder: Path,
    phase: Phase,
    *,
    task: Toy | None = None,
    log: Lines | None = None,
    every: int = 0,
    keep: int = 2,
    fingerprint: str = "f",
    seed: int = 5,
    same_images: bool = False,
    parallel: Parallel | None = None,
) -> tuple[Toy, Lines]:
    """Run `fit` on the toy task in this process, of however many."""
    task, log = task or Toy(phase), log or Lines()
    parallel = parallel or Parallel.start("cpu")
    sampler = IndexSampler(phase.batch, phase.parallel.micro_batch, parallel.rank, parallel.world)
    data = DataConfig(workers=0)
    pixels = Pixels(0 if same_images else None)
    loader = Loader(pixels, sampler, data, seed=seed, phase=phase.name, device="cpu")
    checkpoints = Checkpoints(folder, CheckpointConfig(minutes=60.0, every=every, keep=keep), parallel)
    fit(task, phase, loader, pixels, parallel, checkpoints, log, seed=seed, fingerprint=fingerprint)  # type: ignore[arg-type]
    return task, log


def weights(task: Toy) -> dict[str, Tensor]:
    """What a phase left, on the CPU."""
    return {name: tensor.clone() for name, tensor in task.artifact().items()}


def batches_of(phase: Phase, step: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Micro-batches of a process."""
    for index in IndexSampler(phase.batch, phase.parallel.micro_batch, rank, world).micro_batches(step):
        crops = [Pixels().crop(5, phase.name, i, SIDE) for i in index]
        yield Batch(torch.stack(crops), torch.tensor(index))


def job(folder: Path, phase: Phase, *settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """A process's part of `train_toy`: losses and weights."""
    task, log = train_toy(folder, phase, **dict(settings))
    return log.losses, weights(task)

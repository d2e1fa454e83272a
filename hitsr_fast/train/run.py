"""A whole run: phase after phase, each from what those before it left; nothing stale is used."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hitsr_fast import env
from hitsr_fast.data.sources import Sources, describe
from hitsr_fast.metrics.lpips_weights import require_weights, weights_path
from hitsr_fast.models.hit_var import HitConfig, HitVar, init_from_public
from hitsr_fast.models.state_dicts import check_state, read_state
from hitsr_fast.train.artifacts import (
    WEIGHTS,
    RunFolder,
    file_of,
    fingerprint,
    load_tensors,
    replace_folder,
    sources,
    write_file,
)
from hitsr_fast.train.checkpoint import Checkpoints
from hitsr_fast.train.config import Phase, Recipe
from hitsr_fast.train.data import IndexSampler, Loader, Source, memory_of, open_sources
from hitsr_fast.train.log import Log, SilentLog, measured_peak
from hitsr_fast.train.model import model_config
from hitsr_fast.train.parallel import Parallel
from hitsr_fast.train.server import start_server
from hitsr_fast.train.tasks import TASKS
from hitsr_fast.train.trainer import fit

T = TypeVar("T")


def train(
    recipe: Recipe, data: Path, folder: Path, *, device: str = "auto", rerun_stale: bool = False
) -> Path:
    """Run all phases that are not done yet in `folder`, and write the model to `folder / "model"`.

    The same in each process that `torchrun` starts; all of them see the same two folders.

    Args:
        recipe: What to train and how. A phase without steps is left out.
        data: Of the photos, or the root of the recipe's sources; see `open_sources`.
        folder: Of the run; made if it is not there. An interrupted run goes on from what it holds.
        device: "auto", "cpu" or "cuda".
        rerun_stale: Train anew what was made with other values, and what follows it. What it replaces is kept
            aside, as `<phase>.stale-1`, until the new phase is done.

    Returns:
        The folder of the model, see `HitVar.save_pretrained`; weights in half precision.

    Raises:
        StaleError: `folder` holds work that was made with other values; the message names them.
        NoPhotosError: No photo can be trained on.
        ValueError: The recipe does not fit the model, the data or the number of processes, a source is of
            role "negative", whose label no task takes yet, or what a phase starts from does not fit.
        LpipsWeightsNotFoundError: A loss has a perceptual part, and its weights were not fetched.
        FloatingPointError: Ten steps in a row had a loss or gradient that is not finite.
        Stopped: By SIGTERM or SIGINT, after the step was finished and saved.
    """
    config = model_config(recipe)
    _check_roles(recipe)
    phases = [phase for phase in recipe.phases if phase.schedule.steps]
    if any(_perceptual(phase) for phase in phases):
        require_weights(weights_path())  # now, not hours later at the first phase that needs them
    for phase in phases:
        for source in sources(recipe, phase):
            if not source.startswith("phase:"):
                file_of(source)
    parallel = Parallel.start(device)
    if recipe.data.workers:
        start_server()  # which imports what workers need while the photos are looked at
    photos, held_out = open_sources(
        data,
        recipe.data.sources,
        holdout=recipe.data.holdout,
        crop=config.tokenizer.image_size,
        memory=memory_of(recipe.data),
    )
    if isinstance(photos, Sources) and parallel.is_main:
        for line in describe(photos.counts):
            print(line, flush=True)
    samplers = [
        IndexSampler(phase.batch, phase.parallel.micro_batch, parallel.rank, parallel.world)
        for phase in phases
    ]
    digest = agreed(parallel, lambda: photos.digest)
    if any(parallel.agreed(photos.digest != digest)):
        raise ValueError(f"data: expected the same photos on all machines, found others in {str(data)!r}")
    run = RunFolder(folder, recipe, asdict(config), digest)
    agreed(parallel, partial(run.check, rerun_stale))
    agreed(parallel, partial(write_file, folder / "recipe.json", recipe.to_json().encode()))
    for phase, sampler in zip(phases, samplers, strict=True):
        if not agreed(parallel, partial(run.begin, phase)):
            continue
        tensors = _trained(run, phase, config, sampler, photos, held_out, parallel)
        agreed(parallel, partial(run.finish, phase, tensors))
    agreed(parallel, partial(_write_model, run, config))
    return folder / "model"


def leave() -> None:
    """Part from the other processes, at the end of what this one does."""
    if dist.is_initialized():
        dist.destroy_process_group()


def starting_model(run: RunFolder, phase: Phase, config: HitConfig) -> HitVar:
    """The model as a phase starts from it: random weights of the recipe's seed, and over them its sources."""
    model = _random_model(config, run.recipe.seed)
    for source in sources(run.recipe, phase):
        said = load_source(model, source, run.folder)
        if said and env.rank() == 0:
            print(f"{phase.name}: {said}", flush=True)
    return model


def load_source(model: HitVar, source: str, folder: Path) -> str:
    """Take over what a source of `Phase.init_from` has; the rest of the model stays as it is.

    Returns:
        One line on what was taken of a public checkpoint, else nothing.

    Raises:
        CheckpointError: It has other keys than the model, or other shapes.
        ValueError: There is no such file, or it cannot be read.
    """
    kind, _, name = source.partition(":")
    if kind == "public":
        return init_from_public(model, read_state(file_of(source)), name)
    path = folder / name / "artifact" / WEIGHTS if kind == "phase" else file_of(source)
    tensors, state = load_tensors(path), model.state_dict()
    check_state(
        {key: tuple(value.shape) for key, value in state.items() if key in tensors}, tensors, str(path)
    )
    model.load_state_dict(tensors, strict=False)
    return ""


def _trained(
    run: RunFolder,
    phase: Phase,
    config: HitConfig,
    sampler: IndexSampler,
    photos: Source,
    held_out: Source,
    parallel: Parallel,
) -> dict[str, Tensor]:
    """What a phase yields; its checkpoints, log and pictures are left in its folder."""
    recipe, folder = run.recipe, run.folder / phase.name
    model = starting_model(run, phase, config)
    task = TASKS[phase.task.kind](model, phase, recipe.data, parallel.device)
    loader = Loader(photos, sampler, recipe.data, seed=recipe.seed, phase=phase.name, device=parallel.device)
    checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint, parallel)
    log = _log(run, phase, config, parallel, task.dtype)
    made = fingerprint(run.made_with(phase))
    with contextlib.closing(log):
        if isinstance(photos, Sources):
            log.line("data", step=0, sources=photos.counts)
        fit(
            *(task, phase, loader, held_out, parallel, checkpoints, log),
            seed=recipe.seed,
            fingerprint=made,
        )
    tensors = task.artifact()
    del task, model
    gc.collect()  # cycles would keep the phase's memory while the next one needs it
    return tensors


def _log(run: RunFolder, phase: Phase, config: HitConfig, parallel: Parallel, dtype: torch.dtype) -> Log:
    if not parallel.is_main:
        return SilentLog()
    flops, peak = 0.0, None
    if run.recipe.log.mfu:
        from hitsr_fast.train.plan import step_flops  # a second to import

        flops = step_flops(run.recipe, phase)
        peak = measured_peak(parallel.device, dtype) * parallel.world
    tokens = phase.batch * sum(config.tokenizer.pyramid.lengths)
    return Log(
        run.folder,
        run.recipe.log,
        phase=phase.name,
        steps=phase.schedule.steps,
        tokens_per_step=tokens,
        flops_per_step=flops,
        peak_flops=peak,
    )


def _write_model(run: RunFolder, config: HitConfig) -> None:
    """The model of what the phases yield, in their order, over the files that they started from."""
    recipe = run.recipe
    model = _random_model(config, recipe.seed)
    given = [source for phase in recipe.phases for source in phase.init_from]
    yielded = [f"phase:{phase.name}" for phase in recipe.phases if phase.schedule.steps]
    for source in [*(source for source in given if not source.startswith("phase:")), *yielded]:
        load_source(model, source, run.folder)
    beside = run.folder / "model.part"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.eval().half().save_pretrained(beside)
        replace_folder(run.folder / "model", beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    run.close()


def _random_model(config: HitConfig, seed: int) -> HitVar:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HitVar(config)


def _check_roles(recipe: Recipe) -> None:
    """Images of low quality would be trained towards like any other, as no task knows of their label."""
    for source in recipe.data.sources:
        if source.role == "negative":
            raise ValueError(
                f"data.sources: expected roles train and held-out, found that {source.name!r} is of role "
                "negative, which no task of this recipe takes"
            )


def _perceptual(phase: Phase) -> bool:
    loss = getattr(phase.task, "loss", None)
    decoded = getattr(phase.task, "train", None) != "quantizer"
    return decoded and loss is not None and (loss.alex > 0 or loss.vgg > 0)


def agreed(parallel: Parallel, decide: Callable[[], T]) -> T:
    """What `decide` gives on the first process, on all of them; its error, too."""
    if parallel.world == 1:
        return decide()
    answer: list[tuple[T | None, Exception | None]] = [(None, None)]
    if parallel.is_main:
        try:
            answer = [(decide(), None)]
        except Exception as error:  # which every process raises below
            answer = [(None, error)]
    dist.broadcast_object_list(answer, src=0)
    ((value, fault),) = answer
    if fault is not None:
        raise fault
    return value  # type: ignore[return-value]

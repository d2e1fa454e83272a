"""The one training loop: resumable, logged, the same for every stage."""

from __future__ import annotations

import json
import math
import pickle
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hitsr_fast.train.config import LoopConfig
from hitsr_fast.train.stage import Stage

_Parts = tuple[nn.Module, AveragedModel, list[torch.optim.Optimizer]]


class ResumeError(ValueError):
    """A checkpoint of the run folder is not of this run."""


def train(
    stage: Stage[Any], config: LoopConfig, folder: Path, made_with: Mapping[str, Any] | None = None
) -> nn.Module:
    """Run `stage` to its end, resuming from `folder` if it holds a checkpoint, and return the averaged model.

    Every step's data is a function of the step number, so a resumed run sees what an unbroken one would have
    seen. A finished stage is not run again.

    Args:
        folder: Checkpoints and log; made if it is not there.
        made_with: What the stage's outcome depends on, as JSON values in nested mappings; kept in the
            checkpoint, and a resumed run must have the same.

    Raises:
        ResumeError: The checkpoint in `folder` was made with other values, or does not fit the model.
        FloatingPointError: The loss is not finite; the last checkpoint is from before that step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage.name}.pt"
    optimizers = stage.optimizers()
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = AveragedModel(stage.model, multi_avg_fn=moving_average(config.ema))
    parameters = [p for p in stage.model.parameters() if p.requires_grad]
    parts = stage.model, average, optimizers
    step, elapsed = 0, 0.0
    if path.exists():
        step, elapsed = _restore(path, parts, made_with)
    started = saved = time.monotonic()
    before = elapsed
    recent: list[dict[str, float]] = []

    while (progress := _progress(step, elapsed, config)) < 1.0:
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * learning_rate(progress, config)
        loss, metrics = stage.loss(step)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"{stage.name}: the loss is {loss.item()} at step {step}; {metrics}")
        loss.backward()
        metrics["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, config.clip))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update_parameters(stage.model)
        step += 1
        elapsed = before + time.monotonic() - started

        recent.append({"loss": loss.item(), **metrics})
        if step % config.log_every == 0:
            means = {key: sum(entry[key] for entry in recent) / len(recent) for key in recent[0]}
            _log(folder, {"stage": stage.name, "step": step, "minutes": elapsed / 60, **means})
            recent = []
        if config.eval_every and step % config.eval_every == 0:
            _log(folder, {"stage": stage.name, "step": step, **_evaluated(stage, average.module)})
        if time.monotonic() - saved > 60 * config.checkpoint_minutes:
            _save(path, parts, step, elapsed, made_with)
            saved = time.monotonic()

    if elapsed > before:
        _save(path, parts, step, elapsed, made_with)
        _log(folder, {"stage": stage.name, "step": step, "done": 1.0, **_evaluated(stage, average.module)})
    model: nn.Module = average.module
    return model


def _progress(step: int, elapsed: float, config: LoopConfig) -> float:
    """Share of the run that is done, by steps or by time; a run of no steps is done before it starts."""
    if config.steps == 0:
        return 1.0
    return max(step / config.steps, elapsed / (60 * config.minutes))


def learning_rate(progress: float, config: LoopConfig) -> float:
    """Learning rate over its peak at a share `progress` of the run: linear warm-up, then cosine."""
    if progress < config.warmup:
        return (progress + 1e-4) / (config.warmup + 1e-4)
    along = (progress - config.warmup) / (1.0 - config.warmup)
    return config.final_lr + (1.0 - config.final_lr) * 0.5 * (1.0 + math.cos(math.pi * min(along, 1.0)))


# Parts of the names of what is no matrix, whatever its shape.
_NEVER_DECAYED = ("emb", "codebook", "position", "start", "scale_mul")


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average whose decay rises from 0.1 to `decay`: it soon forgets the first weights."""

    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Any) -> None:
        now = min(decay, (1.0 + float(count)) / (10.0 + float(count)))
        torch._foreach_lerp_(averaged, current, 1.0 - now)

    return update


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices and kernels decay, vectors and embeddings do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            keep = parameter.ndim < 2 or any(part in name for part in _NEVER_DECAYED)
            (plain if keep else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _evaluated(stage: Stage[Any], model: nn.Module) -> dict[str, float]:
    training = model.training
    model.eval()
    with torch.no_grad():
        result = stage.evaluate(model)
    model.train(training)
    return result


def _save(path: Path, parts: _Parts, step: int, elapsed: float, made_with: Mapping[str, Any] | None) -> None:
    temporary = path.with_suffix(".tmp")
    model, average, optimizers = parts
    state: dict[str, Any] = {"step": step, "elapsed": elapsed}
    state |= {"model": model.state_dict(), "average": average.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    if made_with is not None:
        state["made_with"] = json.dumps(made_with)
    torch.save(state, temporary)
    temporary.replace(path)


def _restore(path: Path, parts: _Parts, made_with: Mapping[str, Any] | None) -> tuple[int, float]:
    model, average, optimizers = parts
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ResumeError(f"{path}: expected a checkpoint, found a file that is none") from error
    if made_with is not None and "made_with" in state:
        _require_same(path, json.loads(state["made_with"]), json.loads(json.dumps(made_with)))
    try:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return int(state["step"]), float(state["elapsed"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise ResumeError(f"{path}: expected a checkpoint of this model and recipe: {reason}") from error


def _require_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], shown: int = 4) -> None:
    """Raise `ResumeError` that names what differs, unless a checkpoint was made with what is asked for."""
    then, now = _flat(found), _flat(expected)
    # A value that only one of them has is of another version of the package, whose default keeps the old way.
    names = [name for name in now if name in then and then[name] != now[name]]
    if names:
        differences = [f"{name}={then[name]!r}, not {now[name]!r}" for name in names[:shown]]
        if len(names) > shown:
            differences.append(f"and {len(names) - shown} more")
        raise ResumeError(
            f"{path}: was made with {'; '.join(differences)}; "
            "resume it with the same values or train in another folder"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _log(folder: Path, entry: dict[str, Any]) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    words = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items())
    print(*words, flush=True)

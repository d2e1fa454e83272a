"""What a run says of itself: a progress line, `log.jsonl`, TensorBoard's files and image grids."""

from __future__ import annotations

import functools
import json
import math
import os
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor

from hitsr_fast.train.config import LogConfig

Values = Mapping[str, "float | int | str | Sequence[float] | None"]

_SHOWN_ROWS = 8  # of an image grid
_GAP, _TITLE = 2, 14  # pixels between the pictures of a grid, and above its columns
_ON_SCREEN = 0.25  # seconds between drawings of the progress line


class Log:
    """The log of one phase: `folder / "log.jsonl"`, which all phases share, and what is beside it.

    `log.jsonl` has one JSON object a line, each appended whole: a kill leaves at most one broken line, the
    last, which the next Log removes. Every object has `kind`, `phase`, `step` and `time` (Unix, seconds). Of
    kind "step" are the means of the steps since the one before; a list has a number a scale. What is not
    finite is null, and left out of the means; "not_finite" counts the steps that were.

    A phase that resumes drops the lines of its own that lie beyond: at the first call of `step` those of that
    step or later ones leave the file, which then reads like that of an undisturbed run.

    Values stay on the device until every `config.every`th step, where one copy brings all of them.

    Args:
        folder: Of the run.
        config: What is written, how often.
        phase: Its name.
        steps: Its length.
        tokens_per_step: Tokens, or where there are none latent cells, of a step, over all processes.
        flops_per_step: Floating-point operations of a step, forward and backward, over all processes.
        peak_flops: What all processes could do in a second, see `measured_peak`; None leaves MFU out.

    Raises:
        ModuleNotFoundError: `config.tensorboard` is set and the extra `tensorboard` is not installed.
        OSError: A line cannot be written; nothing of it is left in the file.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        *,
        phase: str,
        steps: int,
        tokens_per_step: float,
        flops_per_step: float,
        peak_flops: float | None,
    ) -> None:
        self.folder, self.config, self.phase, self.steps = folder, config, phase, steps
        self._path = folder / "log.jsonl"
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_step, peak_flops
        self._board = _summary_writer(folder / "tensorboard" / phase) if config.tensorboard else None
        self._screen = _Screen(phase, steps)
        self._window = _Window()
        self._now, self._began, self._collapsed = 0, False, False
        self._wait, self._since = 0.0, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        _mend(self._path)
        self.line(
            "start",
            steps=steps,
            tokens_per_step=tokens_per_step,
            flops_per_step=flops_per_step,
            peak_flops=peak_flops,
        )

    def step(
        self,
        step: int,
        means: Mapping[str, Tensor | float],
        counts: Mapping[str, Tensor],
        *,
        lr: float,
        waited: float,
    ) -> None:
        """Take note of a step that is done; a line at every `config.every`th and at the last.

        Args:
            step: Its number, the first being 1.
            means: As in `Losses`, over all processes: scalars or `(S,)`.
            counts: As in `Losses`, over all processes; "codes" `(S, K)` gives usage and perplexity.
            lr: Learning rate.
            waited: Seconds that the step waited for data.
        """
        if not self._began:
            self._began = True
            _drop(self._path, self.phase, step)
        self._now = step
        self._wait += waited
        self._window.add(means, counts)
        if step % self.config.every and step != self.steps:
            self._screen.advance(step)
            return
        count = self._window.steps
        values, usage = self._window.read()
        elapsed = time.monotonic() - self._since
        pace = elapsed / count
        speed: dict[str, Any] = {"lr": lr, "seconds_per_step": pace, "tokens_per_s": self._tokens / pace}
        if self._peak:
            speed["mfu"] = self._flops / pace / self._peak
        speed |= {"memory_gib": memory_gib(), "data_wait": min(self._wait / elapsed, 1.0)}
        speed["eta_s"] = pace * (self.steps - step)
        self._write("step", step, {**values, **speed})
        self._screen.show(step, values, speed)
        self._warn_of_collapse(step, usage)
        self.restart_clock()

    def line(self, kind: str, **values: Any) -> None:
        """Write one object, and show it; `step` is that of the last step unless it is given.

        For what a phase says beside its steps: "held_out" PSNR and LPIPS, "resumed", "skipped", "done". The
        time since the last line of a step counts to none: it is no time of training.
        """
        step = int(values.pop("step", self._now))
        self._write(kind, step, values)
        self._screen.say(_words({"phase": self.phase, "step": step, "kind": kind, **values}))

    def images(self, step: int, columns: Mapping[str, Tensor]) -> Path:
        """Write a grid to `folder / phase / "images"`, a column a name.

        Args:
            step: In the file's name.
            columns: Each `(B, 3, h, w)` in [-1, 1]; smaller ones are enlarged to the largest, pixel by pixel.

        Returns:
            The PNG's path.
        """
        picture = image_grid(columns)
        path = self.folder / self.phase / "images" / f"step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        picture.save(part, format="PNG")
        os.replace(part, path)
        if self._board is not None:
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            self._board.add_image("images", pixels.view(picture.height, picture.width, 3), step, None, "HWC")
        return path

    def restart_clock(self) -> None:
        """Leave what was done since the last line, such as an evaluation, out of the times of a step."""
        self._wait, self._since = 0.0, time.monotonic()

    def close(self) -> None:
        """End the progress line and TensorBoard's file."""
        self._screen.close()
        if self._board is not None:
            self._board.close()

    def _write(self, kind: str, step: int, values: Values) -> None:
        head = {"kind": kind, "phase": self.phase, "step": step, "time": round(time.time(), 3)}
        append_line(self._path, {**head, **values})
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (list, tuple)):
                    for scale, one in enumerate(value):
                        self._board.add_scalar(f"{name}/scale_{scale}", one, step)
                elif isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def _warn_of_collapse(self, step: int, usage: float | None) -> None:
        """One line as usage falls below the bound, and none until it was above it again."""
        collapsed = usage is not None and usage < self.config.min_usage
        if collapsed and not self._collapsed:
            text = f"only {usage:.1%} of the codes are in use; a tokenizer's revive_below replaces dead ones"
            self.line("warning", step=step, text=text, usage=usage)
        self._collapsed = collapsed


class SilentLog(Log):
    """The log of every process but the first: says nothing, writes nothing."""

    def __init__(self) -> None:
        pass

    def step(self, *_args: Any, **_options: Any) -> None:
        """Nothing."""

    def line(self, kind: str, **values: Any) -> None:
        """Nothing."""

    def images(self, step: int, columns: Mapping[str, Tensor]) -> Path:
        """Nothing; the path of no file."""
        return Path(os.devnull)

    def restart_clock(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _Window:
    """What the steps since the last line gave, left on the device until somebody asks."""

    def __init__(self) -> None:
        self.steps = 0
        self._means: dict[str, list[Tensor | float]] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, means: Mapping[str, Tensor | float], counts: Mapping[str, Tensor]) -> None:
        """Those of a step; they need not be computed yet."""
        self.steps += 1
        for name, value in means.items():
            self._means.setdefault(name, []).append(value)
        for name, count in counts.items():
            self._counts[name] = self._counts[name] + count if name in self._counts else count

    def read(self) -> tuple[dict[str, Any], float | None]:
        """Means by name, usage and perplexity a scale; and the share of the codes in use that could be."""
        parts: dict[str, Tensor] = {}
        for name, rows in self._means.items():
            device = next((value.device for value in rows if isinstance(value, Tensor)), None)
            parts[name] = torch.stack([torch.as_tensor(v, device=device).detach().float() for v in rows])
        overall = None
        if "codes" in self._counts:
            codes = self._counts["codes"]
            parts["/usage"] = (codes > 0).float().mean(1)
            parts["/perplexity"] = perplexity(codes)
            drawn = codes.sum().clamp(1, codes.shape[1])  # no more codes than tokens can be in use
            parts["/overall"] = (codes.sum(0) > 0).sum() / drawn
        read = dict(zip(parts, _copied(list(parts.values())), strict=True))
        values: dict[str, Any] = {}
        not_finite = 0
        for name, table in read.items():
            if name == "/overall":
                overall = float(table)
            elif name.startswith("/"):
                values[name[1:]] = _rounded(table)
            else:
                finite = table.isfinite().reshape(len(table), -1).all(1)
                not_finite = max(not_finite, int((~finite).sum()))
                values[name] = _rounded(table[finite].double().mean(0) if finite.any() else table[0])
        if not_finite:
            values["not_finite"] = not_finite
        self.steps, self._means, self._counts = 0, {}, {}
        return values, overall


def perplexity(codes: Tensor) -> Tensor:
    """exp of the entropy of counts `(..., K)`, along K, float32: from 1, one code alone, to K."""
    share = codes.float() / codes.sum(-1, keepdim=True).clamp_min(1)
    found: Tensor = torch.special.entr(share).sum(-1).exp()
    return found


def _copied(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors on the CPU in float32, by one copy a device."""
    places = dict.fromkeys(tensor.device for tensor in tensors)
    found: dict[int, Tensor] = {}
    for device in places:
        own = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        row = torch.cat([tensors[i].detach().float().flatten() for i in own]).cpu()
        for i, part in zip(own, row.split([tensors[i].numel() for i in own]), strict=True):
            found[i] = part.view(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]


def _rounded(values: Tensor) -> Any:
    """A number, or a list of them, of six digits, which is what float32 has."""
    numbers = values.tolist()
    return [_six(n) for n in numbers] if isinstance(numbers, list) else _six(numbers)


def _six(number: float) -> float:
    return float(f"{number:.6g}")


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype, side: int = 0) -> float:
    """FLOP per second of this machine's products of square matrices in a dtype, the best of a few.

    What a model's FLOPs are held against (MFU): what is measured here, not what a data sheet says. Takes a
    fraction of a second, once a process.

    Args:
        device: Whose.
        dtype: In which a phase multiplies.
        side: Of the matrices; 0 is 1024 on a CPU and 8192 elsewhere.
    """
    side = side or (1024 if device.type == "cpu" else 8192)
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    best = math.inf
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_gib() -> float:
    """Most memory that was held so far: on a GPU by PyTorch, else by this process, in GiB."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # Linux: its ru_maxrss would have the peak of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def image_grid(columns: Mapping[str, Tensor]) -> Image.Image:
    """Pictures side by side: a column a name, a row an image, at most eight.

    Args:
        columns: Each `(B, 3, h, w)` in [-1, 1]; what is not finite is black.

    Raises:
        ValueError: There is no column.
    """
    if not columns:
        raise ValueError("columns: expected at least one, found none")
    height, width = (max(column.shape[axis] for column in columns.values()) for axis in (2, 3))
    rows = min(_SHOWN_ROWS, *(len(column) for column in columns.values()))
    size = len(columns) * (width + _GAP) - _GAP, _TITLE + rows * (height + _GAP) - _GAP
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for place, (name, column) in enumerate(columns.items()):
        left = place * (width + _GAP)
        draw.text((left + 2, 1), name, fill="black")
        images = F.interpolate(column[:rows].detach().float().cpu(), (height, width), mode="nearest")
        pixels = (images.nan_to_num(-1.0).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        for row, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            picture.paste(Image.fromarray(image), (left, _TITLE + row * (height + _GAP)))
    return picture


# --- the file


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one object as a line of JSON, whole or not at all; what is not finite becomes null.

    Raises:
        OSError: It cannot be written, with the file's name.
    """
    data = (json.dumps(_finite(values), allow_nan=False) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            before, written = file.tell(), 0
            try:
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mend(path: Path) -> None:
    """Cut off a last line that a kill left broken."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _drop(path: Path, phase: str, step: int) -> None:
    """Remove the lines of a phase that tell of `step` or later ones."""
    kept, dropped = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        entry = json.loads(line)
        beyond = entry["phase"] == phase and entry["step"] >= step
        dropped += beyond
        if not beyond:
            kept.append(line)
    if not dropped:
        return
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        found = f"log.tensorboard: expected the extra `tensorboard`, found that it is not installed ({error})"
        raise ModuleNotFoundError(f"{found}; pip install 'hitsr-fast[tensorboard]'") from error
    return SummaryWriter(str(folder))


# --- the screen


class _Screen:
    """One line that moves on a terminal; elsewhere a plain line each."""

    def __init__(self, phase: str, steps: int) -> None:
        self._phase, self._steps = phase, steps
        self._console = Console(highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._drawn = 0.0
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=12),
                TextColumn("{task.fields[said]}", markup=False),
            )
            self._progress = Progress(*columns, console=self._console, auto_refresh=False)
            self._task = self._progress.add_task(phase, total=steps, said="")
            self._progress.start()

    def advance(self, step: int) -> None:
        """Count a step."""
        if self._progress is not None and time.monotonic() - self._drawn > _ON_SCREEN:
            self._drawn = time.monotonic()
            self._progress.update(self._task, completed=step, refresh=True)

    def show(self, step: int, values: Values, speed: Mapping[str, Any]) -> None:
        """The loss terms, and how quickly it goes."""
        said = [f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float)]
        said += [f"lr {speed['lr']:.3g}", f"{speed['tokens_per_s']:,.0f} tokens/s"]
        if "mfu" in speed:
            said.append(f"MFU {speed['mfu']:.1%}")
        said += [f"{speed['memory_gib']:.2f} GiB", f"wait {speed['data_wait']:.1%}"]
        said.append(f"ETA {_clock(speed['eta_s'])}")
        if self._progress is not None:
            self._progress.update(self._task, completed=step, said=" ".join(said), refresh=True)
        else:
            self.say(f"{self._phase} {step}/{self._steps} {' '.join(said)}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"

"""`hitsr-fast eval`: a table of metrics per test set, scale and method."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from hitsr_fast.cli.options import ModelOptions
from hitsr_fast.data.degradation_config import DegradationName

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from hitsr_fast.evaluate import EvalSet, Finder, Method, Pictures, Protocol, Report


@dataclass(frozen=True)
class Eval:
    """Score models, bicubic interpolation and pictures of other programs on test sets.

    A test set is a folder of HR images with a folder of x4 smaller LR images, a folder as RealSR, DRealSR,
    DIV2K, StableSR or RealLQ250 are released, HR images alone with --degrade, or LR images alone.
    """

    hr: Path | None = None
    """Folder of HR images."""

    lr: Path | None = None
    """Folder of LR images for --hr; images belong together by name (0801.png and 0801x4.png, too)."""

    sets: Annotated[list[str], tyro.conf.arg(name="set"), tyro.conf.UseAppendAction] = field(
        default_factory=list
    )
    """NAME=HR_DIR:LR_DIR, NAME=DIR, or NAME=:LR_DIR without ground truth; may be repeated."""

    model: tuple[str, ...] = ("hit-tiny",)
    """Models to compare with bicubic: packaged names, local folders or hub ids. --model alone: none."""

    pictures: tuple[str, ...] = ()
    """NAME=DIR: results that another program wrote, in DIR/SET/xSCALE, DIR/xSCALE or, of x4, DIR/SET or
    DIR."""

    protocol: Literal["own", "papers", "iqa"] = "own"
    """Defaults of the options below, and whether models have the colour fix; see docs/evaluation.md."""

    metrics: tuple[str, ...] = ()
    """What to measure: psnr and ssim, on each --channel, and any metric by its own name, as psnr_rgb, lpips
    or niqe."""

    channel: tuple[Literal["y", "rgb"], ...] = ()
    """Of psnr and ssim: y is BT.601 luma. Several give a column each."""

    border: tuple[str, ...] = ()
    """Pixels that PSNR and SSIM leave out on each side; scale is as many as the scale. Several give a
    column each."""

    center_crop: int | None = None
    """Evaluate the central part of that side in HR pixels; 0 is the whole image."""

    scales: tuple[int, ...] = ()
    """Scales to score, out of 1, 2 and 4."""

    out: tuple[Path, ...] = ()
    """Files to save the table to: .json (with every image), .csv or .md. Finished scores are kept beside
    the first, in NAME.scores.jsonl: the same command goes on where it was interrupted."""

    fresh: bool = False
    """Score everything anew, whatever is finished."""

    save: Path | None = None
    """Folder for every result, as METHOD/SET/xSCALE/NAME.png."""

    sheet: Path | None = None
    """PNG file to draw: cut-outs of the first images of each set, of input, methods and HR side by side."""

    sheet_images: int = 8
    """Images of each set on the sheet."""

    degrade: bool = False
    """Make the LR images from the HR images by the Real-ESRGAN degradation, with the seed."""

    degradation: DegradationName = "real-esrgan"
    """Strengths of --degrade."""

    limit: int | None = None
    """Use the first images of each set only."""

    # Without a name of its own its fields are options of the command.
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def run(self) -> int:
        """Evaluate, print and save; return the exit code: 0, or 2 when the input is at fault."""
        from hitsr_fast.dispatch import BackendUnavailableError
        from hitsr_fast.evaluate import PROTOCOLS, EvaluationError, check_report_path
        from hitsr_fast.imaging.io import ImageFileError
        from hitsr_fast.pipeline import NonFiniteOutputError

        faults = (EvaluationError, BackendUnavailableError, NonFiniteOutputError, ImageFileError, OSError)
        try:
            for path in self.out:
                check_report_path(path)
            protocol = PROTOCOLS[self.protocol]
            sets = self._sets(protocol)
            for note in dict.fromkeys(note for eval_set in sets for note in eval_set.notes):
                print(f"warning: {note}", file=sys.stderr)
            report = self._evaluate(sets, protocol)
            print_report(report)
            for path in self.out:
                report.save(path)
                print(f"wrote {path}")
        except faults as error:
            print(f"hitsr-fast eval: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if self.out:
                print("what is finished is kept: the same command goes on from here", file=sys.stderr)
            raise
        return 0

    def _sets(self, protocol: Protocol) -> list[EvalSet]:
        from hitsr_fast.evaluate import EvaluationError, find_set

        if self.how.seed < 0:
            raise EvaluationError(f"--seed: expected at least 0, found {self.how.seed}")
        if self.limit is not None and self.limit < 1:
            raise EvaluationError(f"--limit: expected at least 1, found {self.limit}")
        folders: list[tuple[str, Path | None, Path | None]] = []
        if self.hr is not None:
            folders.append((self.hr.resolve().name, self.hr, self.lr))
        elif self.lr is not None:
            raise EvaluationError("--lr needs --hr; name a set without ground truth as --set NAME=:LR_DIR")
        for text in self.sets:
            name, equals, paths = text.partition("=")
            hr, _, lr = paths.partition(":")
            if not (name and equals and (hr or lr)):
                expected = "NAME=HR_DIR:LR_DIR, NAME=DIR or NAME=:LR_DIR"
                raise EvaluationError(f"--set: expected {expected}, found {text!r}")
            folders.append((name, Path(hr) if hr else None, Path(lr) if lr else None))
        if not folders:
            raise EvaluationError("nothing to evaluate: give --hr or --set")
        options: dict[str, Any] = {
            "degrade_seed": self.how.seed if self.degrade else None,
            "degradation": self.degradation,
            "center_crop": (protocol.center_crop if self.center_crop is None else self.center_crop) or None,
            "limit": self.limit,
        }
        return [find_set(name, hr, lr, **options) for name, hr, lr in folders]

    def _evaluate(self, sets: list[EvalSet], protocol: Protocol) -> Report:
        import torch

        from hitsr_fast import __version__
        from hitsr_fast.evaluate import (
            Bicubic,
            EvaluationError,
            Journal,
            Sheet,
            check_request,
            columns_of,
            digest_of,
            evaluate,
            journal_path,
            parse_border,
            runnable,
        )
        from hitsr_fast.pipeline import pick_device

        saves = self.save is not None
        metrics, left_out = (self.metrics, ()) if self.metrics else runnable(protocol, saves=saves)
        borders = tuple(map(parse_border, self.border)) or protocol.borders
        columns = columns_of(metrics, self.channel or protocol.channels, borders)
        scales, outside = self.scales or protocol.scales, self._outside()
        names = [Bicubic.name, *self.model, *(method.name for method in outside)]
        # Before the models are loaded: what is missing is said at once.
        check_request(sets, names, scales, columns, saves=saves, draws=self.sheet is not None)
        how = self.how if protocol.colour_fix else replace(self.how, colour_fix=False)
        sheet = None if self.sheet is None else Sheet(self.sheet, images=self.sheet_images)
        try:
            device = pick_device(how.device)
            options = how.upscale_options()
            methods = [*self._methods(how), *outside]
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        settings: dict[str, Any] = {
            "protocol": protocol.name,
            "channel": list(self.channel or protocol.channels),
            "border": list(borders),
            "center_crop": sets[0].center_crop,
            "degrade": self.degrade,
            "degradation": self.degradation if self.degrade else None,
            "dtype": how.dtype,
        }
        settings |= asdict(options)
        settings |= settings.pop("sampling") | {"scales": list(scales)}
        settings |= {"device": device.type, "hitsr_fast": __version__, "torch": torch.__version__}
        settings["packages"] = sorted({column.metric.version() for column in columns} - {""})
        journal = None
        if self.out:
            place = journal_path(self.out[0])
            if self.fresh:
                place.unlink(missing_ok=True)
            journal = Journal(place)
        # What each image is, and what a method makes of it, have digests of their own.
        digest = digest_of(how.dtype, device.type, __version__, torch.__version__)
        with progress_line(sum(len(eval_set.pairs) for eval_set in sets) * len(methods)) as step:
            report = evaluate(
                *(sets, methods),
                scales=scales,
                columns=columns,
                device=device,
                progress=step,
                journal=journal,
                settings_digest=digest,
                save=self.save,
                sheet=sheet,
            )
        return replace(report, settings=settings, notes=(*report.notes, *left_out))

    def _methods(self, how: ModelOptions) -> list[Method | Finder]:
        from hitsr_fast.evaluate import Bicubic, HitSRMethod, file_fingerprint
        from hitsr_fast.models.hub import CONFIG_FILE, WEIGHTS_FILE, find_weights

        methods: list[Method | Finder] = [Bicubic()]
        options = how.upscale_options()
        for name in self.model:
            model = how.load(name)
            model.plan(1, 1, options)  # options that do not suit the model are an error before the work
            fingerprint = None
            if self.out:
                folder = find_weights(name)
                fingerprint = " ".join(
                    file_fingerprint(folder / file) for file in (CONFIG_FILE, WEIGHTS_FILE)
                )
            methods.append(HitSRMethod(name, model, options, fingerprint))
        return methods

    def _outside(self) -> list[Pictures]:
        from hitsr_fast.evaluate import EvaluationError, Pictures

        methods = []
        for text in self.pictures:
            name, equals, place = text.partition("=")
            if not (name and equals and place):
                raise EvaluationError(f"--pictures: expected NAME=DIR, found {text!r}")
            methods.append(Pictures(name, Path(place)))
        return methods


@contextmanager
def progress_line(total: int) -> Iterator[Callable[[str], None]]:
    """A line on stderr, where that is a terminal, with what is done, what is left and the time it will take.

    Yields:
        To be called with a description before each of `total` steps.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, begun = progress.add_task("", total=total), False

        def step(what: str) -> None:
            nonlocal begun
            progress.update(task, description=escape(what), advance=int(begun))
            begun = True

        yield step


def print_report(report: Report) -> None:
    """Print the means as a table, then the notes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*report.head)
    for column in table.columns[3:]:
        column.justify = "right"
    for row in report.rows():
        table.add_row(*(Text(cell) for cell in row))
    print_table(table)
    console = Console()
    for note in report.notes:
        console.print(note, markup=False, emoji=False, highlight=False)


def print_table(table: Table) -> None:
    """Print a table with its cells whole, however wide it is."""
    from rich.console import Console

    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    if needed > console.width:  # a long line that a terminal breaks is read more easily than numbers cut off
        console = Console(width=needed)
    console.print(table)

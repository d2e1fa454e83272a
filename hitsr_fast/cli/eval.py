"""`hitsr-fast eval`: a table of PSNR-Y, SSIM-Y and LPIPS per test set, scale and method."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from hitsr_fast.cli.options import ModelOptions

if TYPE_CHECKING:
    from hitsr_fast.evaluate import EvalSet, Report


@dataclass(frozen=True)
class Eval:
    """Score models and bicubic interpolation on test sets.

    A test set is a folder of HR images with a folder of x4 smaller LR images, one folder that holds both as
    NAME_HR.png and NAME_LR.png (also one level down, in image_SRF_4), or HR images alone with --degrade.
    """

    hr: Path | None = None
    """Folder of HR images."""

    lr: Path | None = None
    """Folder of LR images for --hr; images belong together by name (0801.png and 0801x4.png, too)."""

    sets: Annotated[list[str], tyro.conf.arg(name="set"), tyro.conf.UseAppendAction] = field(
        default_factory=list
    )
    """NAME=HR_DIR:LR_DIR or NAME=DIR; may be repeated."""

    model: tuple[str, ...] = ("hit-tiny",)
    """Models to compare with bicubic: packaged names, local folders or hub ids. --model alone: none."""

    scales: tuple[int, ...] = (1, 2, 4)
    """Scales to score, out of 1, 2 and 4."""

    out: tuple[Path, ...] = ()
    """Files to save the table to: .json (with every image), .csv or .md."""

    degrade: bool = False
    """Make the LR images from the HR images by the Real-ESRGAN degradation, with the seed."""

    limit: int | None = None
    """Use the first images of each set only."""

    # Without a name of its own its fields are options of the command.
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def run(self) -> int:
        """Evaluate, print and save; return the exit code: 0, or 2 when the input is at fault."""
        from hitsr_fast.dispatch import BackendUnavailableError
        from hitsr_fast.evaluate import EvaluationError, check_report_path
        from hitsr_fast.pipeline import NonFiniteOutputError

        try:
            for path in self.out:
                check_report_path(path)
            report = self._evaluate(self._sets())
            _print(report)
            for path in self.out:
                report.save(path)
                print(f"wrote {path}")
        except (EvaluationError, BackendUnavailableError, NonFiniteOutputError, OSError) as error:
            print(f"hitsr-fast eval: {error}", file=sys.stderr)
            return 2
        return 0

    def _sets(self) -> list[EvalSet]:
        from hitsr_fast.evaluate import EvaluationError, find_set

        if self.how.seed < 0:
            raise EvaluationError(f"--seed: expected at least 0, found {self.how.seed}")
        if self.limit is not None and self.limit < 1:
            raise EvaluationError(f"--limit: expected at least 1, found {self.limit}")
        folders: list[tuple[str, Path, Path | None]] = []
        if self.hr is not None:
            folders.append((self.hr.resolve().name, self.hr, self.lr))
        elif self.lr is not None:
            raise EvaluationError("--lr needs --hr")
        for text in self.sets:
            name, equals, paths = text.partition("=")
            hr, _, lr = paths.partition(":")
            if not (name and equals and hr):
                raise EvaluationError(f"--set: expected NAME=HR_DIR:LR_DIR or NAME=DIR, found {text!r}")
            folders.append((name, Path(hr), Path(lr) if lr else None))
        if not folders:
            raise EvaluationError("nothing to evaluate: give --hr or --set")
        seed = self.how.seed if self.degrade else None
        return [find_set(name, hr, lr, degrade_seed=seed, limit=self.limit) for name, hr, lr in folders]

    def _evaluate(self, sets: list[EvalSet]) -> Report:
        import torch
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress

        from hitsr_fast import __version__
        from hitsr_fast.evaluate import Bicubic, EvaluationError, HitSRMethod, Method, evaluate
        from hitsr_fast.metrics.lpips_weights import require_weights, weights_path
        from hitsr_fast.pipeline import pick_device

        # Before the models are loaded: what is missing is said at once.
        require_weights(weights_path())
        methods: list[Method] = [Bicubic()]
        try:
            device = pick_device(self.how.device)
            options = self.how.upscale_options(scales=self.scales)
            for name in self.model:
                model = self.how.load(name)
                model.plan(1, 1, options)  # options that do not suit the model are an error before the work
                methods.append(HitSRMethod(name, model, options))
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        settings = {"degrade": self.degrade, "dtype": self.how.dtype} | asdict(options)
        settings |= settings.pop("sampling")
        settings |= {"device": device.type, "hitsr_fast": __version__, "torch": torch.__version__}
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=sum(len(eval_set.pairs) for eval_set in sets))

            def step(image: str) -> None:
                progress.update(task, description=escape(image), advance=1)

            report = evaluate(sets, methods, scales=self.scales, device=device, progress=step)
        return replace(report, settings=settings)


def _print(report: Report) -> None:
    """Print the means as a table, then the notes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hitsr_fast.evaluate import COLUMNS, format_mean

    table = Table(*COLUMNS)
    for column in table.columns[3:]:
        column.justify = "right"
    for score in report.means():
        table.add_row(*(Text(cell) for cell in format_mean(score)))
    console = Console()
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False, emoji=False, highlight=False)

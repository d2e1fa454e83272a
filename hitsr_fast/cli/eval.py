"""`hitsr-fast eval`: a table of PSNR-Y, SSIM-Y and LPIPS per test set, scale and method."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    import torch

    from hitsr_fast.evaluate import EvalSet, HitSRMethod, Report


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

    scales: tuple[Literal[1, 2, 4], ...] = (1, 2, 4)
    """Scales to score."""

    out: tuple[Path, ...] = ()
    """Files to save the table to: .json (with every image), .csv or .md."""

    degrade: bool = False
    """Make the LR images from the HR images by the Real-ESRGAN degradation."""

    seed: int = 0
    """Seed of the degradation, and of the models' draws where top-k is not 1."""

    class_id: Literal[0, 1] = 0
    """Class the models are told: 0 for photos as they come, 1 for inputs that were only made smaller."""

    guidance: float = 0.0
    """Classifier-free guidance of the models; 0 is none."""

    top_k: int = 1
    """Models draw among that many codes; 1 takes the likeliest, 0 draws among all."""

    top_p: float = 1.0
    """Models draw among the likeliest codes of that total probability."""

    colour_fix: bool = True
    """Models take colours (the low frequencies) from the input."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models and metrics run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In which models compute; auto is bfloat16 where the device multiplies it in hardware, else float32."""

    limit: int | None = None
    """Use the first images of each set only."""

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

        if self.seed < 0:
            raise EvaluationError(f"--seed: expected at least 0, found {self.seed}")
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
        seed = self.seed if self.degrade else None
        return [find_set(name, hr, lr, degrade_seed=seed, limit=self.limit) for name, hr, lr in folders]

    def _evaluate(self, sets: list[EvalSet]) -> Report:
        import torch
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress

        from hitsr_fast import __version__
        from hitsr_fast.dispatch import forced_backend
        from hitsr_fast.evaluate import Bicubic, EvaluationError, Method, evaluate
        from hitsr_fast.metrics.lpips_weights import require_weights, weights_path
        from hitsr_fast.pipeline import pick_device

        # Before the models are loaded: what is missing is said at once.
        require_weights(weights_path())
        try:
            forced_backend()
            device = pick_device(self.device)
            methods: list[Method] = [Bicubic(), *(self._load(model, device) for model in self.model)]
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        kept = ("degrade", "seed", "class_id", "guidance", "top_k", "top_p", "colour_fix", "dtype")
        settings = {name: getattr(self, name) for name in kept}
        settings |= {"device": device.type, "hitsr_fast": __version__, "torch": torch.__version__}
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=sum(len(eval_set.pairs) for eval_set in sets))

            def step(image: str) -> None:
                progress.update(task, description=escape(image), advance=1)

            report = evaluate(sets, methods, scales=self.scales, device=device, progress=step)
        return replace(report, settings=settings)

    def _load(self, model: str, device: torch.device) -> HitSRMethod:
        import torch

        from hitsr_fast.evaluate import HitSRMethod
        from hitsr_fast.pipeline import HitSR, UpscaleOptions

        options = UpscaleOptions(
            seed=self.seed,
            class_id=self.class_id,
            guidance=self.guidance,
            top_k=self.top_k,
            top_p=self.top_p,
            colour_fix=self.colour_fix,
        )
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return HitSRMethod(model, HitSR.from_pretrained(model, device, dtype), options)


def _print(report: Report) -> None:
    """Print the means as a table, then the notes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hitsr_fast.evaluate import format_mean

    table = Table("set", "scale", "method", "images", "PSNR-Y", "SSIM-Y", "LPIPS")
    for column in table.columns[3:]:
        column.justify = "right"
    for score in report.means():
        table.add_row(*(Text(cell) for cell in format_mean(score)))
    console = Console()
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False, emoji=False, highlight=False)

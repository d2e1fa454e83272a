"""`hitsr-fast eval-tokenizer`: how well a model's tokens give images back."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from hitsr_fast.evaluate import EvalSet
    from hitsr_fast.evaluate.tokenizer import TokenizerReport


@dataclass(frozen=True)
class EvalTokenizer:
    """Tokenize and decode the centres of HR images, by plain scale lists and by HIT-VAR's Algorithm 1.

    A table of the reconstruction at each target, and one of the codes that each scale uses.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Packaged model, local folder or hub id."""

    sets: Annotated[list[str], tyro.conf.arg(name="set"), tyro.conf.UseAppendAction] = field(
        default_factory=list
    )
    """NAME=DIR of HR images, or a folder as `eval` takes it; may be repeated."""

    metrics: tuple[str, ...] = ("psnr_rgb", "psnr_y", "lpips", "fd_vgg")
    """What to measure, by the names that `eval` has; fd_vgg is a Fréchet distance of VGG16 features."""

    border: str = "0"
    """Pixels that PSNR and SSIM leave out on each side; scale is as many as the target's factor."""

    out: tuple[Path, ...] = ()
    """Files to save the table to: .json (with every image and the use of codes), .csv or .md."""

    limit: int | None = None
    """Use the first images of each set only."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto is cuda where there is a device."""

    def run(self) -> int:
        """Evaluate, print and save; return the exit code: 0, or 2 when the input is at fault."""
        from hitsr_fast.cli.eval import print_report
        from hitsr_fast.evaluate import EvaluationError, check_report_path

        try:
            for path in self.out:
                check_report_path(path)
            found = self._evaluate(self._sets())
            print_report(found.report)
            _print_usage(found)
            for path in self.out:
                found.report.save(path)
                print(f"wrote {path}")
        except (EvaluationError, ValueError, OSError) as error:
            print(f"hitsr-fast eval-tokenizer: {error}", file=sys.stderr)
            return 2
        return 0

    def _sets(self) -> list[EvalSet]:
        from hitsr_fast.evaluate import EvaluationError, find_set

        if not self.sets:
            raise EvaluationError("nothing to evaluate: give --set")
        if self.limit is not None and self.limit < 1:
            raise EvaluationError(f"--limit: expected at least 1, found {self.limit}")
        found = []
        for text in self.sets:
            name, equals, place = text.partition("=")
            if not (name and equals and place):
                raise EvaluationError(f"--set: expected NAME=DIR, found {text!r}")
            # No input is made here: the seed only says that LR images are not needed.
            found.append(find_set(name, Path(place), degrade_seed=0, limit=self.limit))
        return found

    def _evaluate(self, sets: list[EvalSet]) -> TokenizerReport:
        import torch

        from hitsr_fast import __version__
        from hitsr_fast.cli.eval import progress_line
        from hitsr_fast.evaluate import EvaluationError, columns_of, parse_border, require
        from hitsr_fast.evaluate.names import check_names
        from hitsr_fast.evaluate.tokenizer import evaluate_tokenizer
        from hitsr_fast.models import HitVar
        from hitsr_fast.pipeline import pick_device

        names = tuple(name for name in self.metrics if name != "fd_vgg")
        if not self.metrics:
            raise EvaluationError("metrics: expected those of images, or fd_vgg, found none")
        border = parse_border(self.border)
        columns = columns_of(names, borders=(border,)) if names else ()
        if of_sets := [column.metric.name for column in columns if column.metric.kind == "set"]:
            raise EvaluationError(f"metrics: expected those of images, or fd_vgg, found {', '.join(of_sets)}")
        require(columns, saves=False)
        check_names("set", [eval_set.name for eval_set in sets])
        device = pick_device(self.device)
        model = HitVar.from_pretrained(self.model, device=device)
        with progress_line(sum(len(eval_set.pairs) for eval_set in sets)) as step:
            found = evaluate_tokenizer(
                *(model, sets, columns), device=device, fd_vgg="fd_vgg" in self.metrics, progress=step
            )
        settings = {
            "model": self.model,
            "metrics": list(self.metrics),
            "border": border,
            "limit": self.limit,
            "device": device.type,
            "hitsr_fast": __version__,
            "torch": torch.__version__,
            "packages": sorted({column.metric.version() for column in columns} - {""}),
        }
        return replace(found, report=replace(found.report, settings=settings))


def _print_usage(found: TokenizerReport) -> None:
    """Print the use of codes by scale as a table."""
    from rich.table import Table
    from rich.text import Text

    from hitsr_fast.cli.eval import print_table

    table = Table("set", "scheme", "target", "scale", "tokens", "codes used", "usage", "perplexity")
    for use in found.usage:
        share = f"{100 * use.used / use.codes:.1f} %"
        cells = (
            f"x{use.factor}",
            str(use.side),
            str(use.tokens),
            str(use.used),
            share,
            f"{use.perplexity:.1f}",
        )
        table.add_row(Text(use.set), use.scheme, *cells)
    print_table(table)

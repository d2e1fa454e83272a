"""The evaluation job: methods against test sets, scored column by column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.journal import Finished, Journal, digest_of
from hitsr_fast.evaluate.layouts import shown
from hitsr_fast.evaluate.methods import Finder, Method, file_fingerprint
from hitsr_fast.evaluate.names import (
    INPUT,
    TRUTH,
    check_file_names,
    check_method_names,
    check_names,
    file_name,
)
from hitsr_fast.evaluate.protocols import PROTOCOLS, Column, columns_of, require
from hitsr_fast.evaluate.report import Report, Row, Score, left_out
from hitsr_fast.evaluate.sets import PAIR_SCALE, SCALES, EvalSet, Loaded, brought_down, quantized, read_image
from hitsr_fast.evaluate.sheet import Sheet
from hitsr_fast.imaging.io import Picture
from hitsr_fast.imaging.writing import write_picture


def evaluate(
    sets: Sequence[EvalSet],
    methods: Sequence[Method | Finder],
    *,
    scales: Sequence[int] = SCALES,
    columns: Sequence[Column] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
    journal: Journal | None = None,
    settings_digest: str = "",
    save: Path | None = None,
    sheet: Sheet | None = None,
) -> Report:
    """Score methods on test sets.

    Args:
        sets: the test sets.
        methods: the methods; `Bicubic` is among them by custom, not by force.
        scales: the factors to score, out of `SCALES`.
        columns: what to measure; by default PSNR-Y and SSIM-Y without a border of the scale, and LPIPS.
        device: where methods and metrics run.
        progress: called with the names of image and method before each step, of which there are as many as
            methods times images.
        journal: where finished scores are kept and found again.
        settings_digest: of what the scores depend on besides images, methods, scale and columns.
        save: folder for every result, as METHOD/SET/xSCALE/NAME.png. Where a column compares folders, the
            ground truth lies beside the methods, as HR.
        sheet: pictures to draw beside the table.

    Returns:
        One score per set, image, scale and method. The ground truth of scale 4 is the HR image; of 2 and 1 it
        is the HR image scaled down by antialiased bicubic. Results and ground truth are rounded to 8 bit.

    Raises:
        EvaluationError: before any work what `check_request` says, and where a folder whose pictures are
            compared holds others; later a result of the wrong size.
    """
    if columns is None:
        own = PROTOCOLS["own"]
        columns = columns_of(own.metrics, own.channels, own.borders)
    names = [method.name for method in methods]
    check_request(sets, names, scales, columns, saves=save is not None, draws=sheet is not None)
    run = _Run(tuple(columns), sorted(set(scales)), device, progress, journal, settings_digest, save, sheet)
    for eval_set in sets:
        run.check_folders(eval_set, methods)
    with torch.inference_mode():
        for eval_set in sets:
            run.score_set(eval_set, methods)
    if sheet is not None:
        sheet.save()
    return run.report()


def check_request(
    sets: Sequence[EvalSet],
    methods: Sequence[str],
    scales: Sequence[int],
    columns: Sequence[Column],
    *,
    saves: bool,
    draws: bool,
) -> None:
    """What can be said of an evaluation before its methods are made.

    Args:
        sets: the test sets.
        methods: names of the methods.
        scales: the factors to score.
        columns: what to measure.
        saves: whether every result is saved.
        draws: whether there is a sheet.

    Raises:
        EvaluationError: an unknown scale, two methods or sets of one name, or two images of a set that would
            be saved as one file; a column that cannot be measured here, or a set without what all columns
            need.
    """
    unknown = [scale for scale in scales if scale not in SCALES]
    if unknown or not scales:
        raise EvaluationError(f"scales: expected some of {SCALES}, found {tuple(scales)}")
    check_method_names(methods, saved=saves, drawn=draws)
    names = [eval_set.name for eval_set in sets]
    check_names("set", names)
    if saves:
        check_file_names("sets", names)
        for eval_set in sets:
            check_file_names(f"images of {eval_set.name}", [pair.name for pair in eval_set.pairs])
    require(columns, saves=saves)
    for eval_set in sets:
        if not eval_set.has_truth and all(column.metric.kind == "full" for column in columns):
            titles = ", ".join(column.title for column in columns)
            raise EvaluationError(
                f"{eval_set.name}: has no ground truth, which {titles} need: add --metrics niqe"
            )


@dataclass
class _Run:
    """What an evaluation is made with, and what it has found so far."""

    columns: tuple[Column, ...]
    scales: list[int]
    device: torch.device | str
    progress: Callable[[str], None] | None
    journal: Journal | None
    settings_digest: str
    save: Path | None
    sheet: Sheet | None
    scores: list[Score] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    set_values: dict[Row, dict[str, float]] = field(default_factory=dict)
    # Of each set and method, what was not found of another program's results.
    absent: dict[tuple[str, str], dict[int, list[str]]] = field(default_factory=dict)
    # Of each set, scale and reason, the images that a column does not have.
    missing: dict[str, dict[tuple[int, str], dict[str, None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.of_image = [column for column in self.columns if column.metric.kind != "set"]
        self.of_set = [column for column in self.columns if column.metric.kind == "set"]

    def report(self) -> Report:
        return Report(tuple(self.scores), tuple(self.notes), columns=self.columns, set_values=self.set_values)

    def note(self, *notes: str) -> None:
        self.notes |= dict.fromkeys(notes)

    def score_set(self, eval_set: EvalSet, methods: Sequence[Method | Finder]) -> None:
        self.note(*eval_set.notes)
        if not eval_set.has_truth:
            self.note(f"{eval_set.name}: no ground truth, so metrics without reference only")
        for method in methods:
            refused = [f"x{scale}" for scale in self.scales if scale not in _offered(method, self.scales)]
            if refused:
                self.note(f"{method.name} has no {', '.join(refused)}")
        for index in range(len(eval_set.pairs)):
            _Image(self, eval_set, index).score(methods)
        reasons = {key: list(names) for key, names in self.missing.get(eval_set.name, {}).items()}
        self.note(*left_out(eval_set.name, reasons, len(eval_set.pairs)))
        for method in methods:
            for scale, names in self.absent.get((eval_set.name, method.name), {}).items():
                few = len(names) < len(eval_set.pairs)
                what = f"no x{scale} pictures of {eval_set.name}" + (f": {shown(names)}" if few else "")
                self.note(f"{method.name} has {what}")
            self.score_folders(eval_set, method.name)

    def check_folders(self, eval_set: EvalSet, methods: Sequence[Method | Finder]) -> None:
        """Raise EvaluationError where a folder that will be compared holds pictures of no image."""
        if not self.of_set or not eval_set.has_truth:
            return
        names = [pair.name for pair in eval_set.pairs]
        for scale in self.scales:
            expected = {TRUTH: names}
            for method in methods:
                if isinstance(method, Finder):
                    found = [name for name in names if method.find(eval_set.name, name, scale) is not None]
                    expected[method.name] = found
                elif scale in _offered(method, self.scales):
                    expected[method.name] = names
            for method_name, own in expected.items():
                folder = self.folder(eval_set.name, scale, method_name)
                if own and folder.is_dir():
                    _check_folder(folder, own)

    def score_folders(self, eval_set: EvalSet, method: str) -> None:
        """Measure what needs all results of a method on a set, in their folders."""
        if not self.of_set or not eval_set.has_truth:
            return
        for scale in self.scales:
            row = Row(eval_set.name, scale, method)
            own = [score.image for score in self.scores if Row(score.set, score.scale, score.method) == row]
            if own:
                results, truths = self.folder(*row), self.folder(eval_set.name, scale, TRUTH)
                _check_folder(results, own)
                _check_folder(truths, [pair.name for pair in eval_set.pairs])
                values = {column.key: float(column.metric.measure(results, truths)) for column in self.of_set}
                self.set_values[row] = values

    def folder(self, eval_set: str, scale: int, method: str) -> Path:
        assert self.save is not None
        return self.save / file_name(method) / file_name(eval_set) / f"x{scale}"


class _Image:
    """One image of a set; its files are decoded when that is needed, and only then."""

    def __init__(self, run: _Run, eval_set: EvalSet, index: int) -> None:
        self.run, self.set, self.index = run, eval_set, index
        self.name = eval_set.pairs[index].name
        self.where = f"{eval_set.name}/{self.name}"
        self._loaded: Loaded | None = None
        self._truths: dict[int, Tensor] = {}
        self.shown = run.sheet is not None and index < run.sheet.images

    def loaded(self) -> Loaded:
        if self._loaded is None:
            self._loaded = self.set.load(self.index)
        return self._loaded

    def truth(self, scale: int) -> Tensor | None:
        hr = self.loaded().hr
        if hr is None:
            return None
        if scale not in self._truths:
            self._truths[scale] = brought_down(hr.to(self.run.device), PAIR_SCALE // scale)
        return self._truths[scale]

    def score(self, methods: Iterable[Method | Finder]) -> None:
        run = self.run
        fingerprint = self.set.fingerprint(self.index) if run.journal is not None else ""
        if run.of_set and self.set.has_truth:
            for scale in run.scales:
                # Made anew each time: a ground truth that has changed must not stay.
                _write(self.saved(TRUTH, scale), self.truth(scale))
        for method in methods:
            if run.progress is not None:
                run.progress(f"{self.where} {method.name}")
            self.score_method(method, fingerprint)
        if self.shown:
            assert run.sheet is not None
            self.show(INPUT, self.loaded().lr)
            if (truth := self.truth(run.scales[-1])) is not None:
                self.show(TRUTH, truth)

    def score_method(self, method: Method | Finder, fingerprint: str) -> None:
        run, files = self.run, self.files(method)
        scales = [scale for scale in _offered(method, run.scales) if files is None or scale in files]
        keys = {scale: self.key(method, files, scale, fingerprint) for scale in scales}
        finished = {scale: self.finished(keys[scale]) for scale in scales}
        wanted = [
            scale
            for scale in scales
            if not self.is_done(method.name, scale, finished[scale]) or self.is_shown(scale)
        ]
        results = self.results(method, files, wanted) if wanted else {}
        for scale in scales:
            known = finished[scale]
            if scale in results:
                known = self.take(method.name, scale, results[scale], known, keys[scale])
            assert known is not None
            run.note(*(f"{self.set.name}: {note}" for note in known.notes))
            for reason in known.missing:
                run.missing.setdefault(self.set.name, {}).setdefault((scale, reason), {})[self.name] = None
            run.scores.append(Score(self.set.name, scale, method.name, self.name, known.values))

    def take(
        self, method: str, scale: int, result: Tensor, known: Finished | None, key: str | None
    ) -> Finished:
        """Measure, save, show and keep a result."""
        if self.is_shown(scale):
            self.show(method, result)
        new = known or self.measured(result, scale)
        if self.run.save is not None:
            path = self.saved(method, scale)
            _write(path, result)
            new = new._replace(picture=file_fingerprint(path))
        if new != known and key is not None and self.run.journal is not None:
            self.run.journal.add(key, new, set=self.set.name, image=self.name, scale=scale, method=method)
        return new

    def is_shown(self, scale: int) -> bool:
        """Whether the results of that scale are on the sheet."""
        return self.shown and scale == self.run.scales[-1]

    def is_done(self, method: str, scale: int, known: Finished | None) -> bool:
        """Whether a result is measured and, where it is to be saved, lies in its place."""
        if known is None or self.run.save is None:
            return known is not None
        path = self.saved(method, scale)
        return path.is_file() and file_fingerprint(path) == known.picture

    def saved(self, method: str, scale: int) -> Path:
        """Where a result lies."""
        return self.run.folder(self.set.name, scale, method) / f"{file_name(self.name)}.png"

    def finished(self, key: str | None) -> Finished | None:
        return None if key is None or self.run.journal is None else self.run.journal.get(key)

    def files(self, method: Method | Finder) -> dict[int, Path] | None:
        """The files of results that exist already; None for a method that makes them."""
        if not isinstance(method, Finder):
            return None
        found: dict[int, Path] = {}
        for scale in self.run.scales:
            path = method.find(self.set.name, self.name, scale)
            if path is not None:
                found[scale] = path
            else:
                absent = self.run.absent.setdefault((self.set.name, method.name), {})
                absent.setdefault(scale, []).append(self.name)
        return found

    def key(
        self, method: Method | Finder, files: dict[int, Path] | None, scale: int, fingerprint: str
    ) -> str | None:
        """Of all that a score depends on; None where the method does not say what its results depend on."""
        if self.run.journal is None:
            return None
        own = getattr(method, "fingerprint", None) if files is None else file_fingerprint(files[scale])
        columns = [(column.key, column.border, column.metric.version()) for column in self.run.of_image]
        if own is None:
            return None
        return digest_of(self.run.settings_digest, fingerprint, method.name, own, scale, columns)

    def results(
        self, method: Method | Finder, files: dict[int, Path] | None, scales: Sequence[int]
    ) -> dict[int, Tensor]:
        loaded, device = self.loaded(), self.run.device
        if files is not None:
            region = loaded.region
            made: dict[int, Tensor] = {}
            for scale in scales:
                image = read_image(files[scale]).to(device)
                full = (region.full_height * scale, region.full_width * scale)
                if not region.is_whole and tuple(image.shape[2:]) == full:
                    image = region.cut(image, scale)
                made[scale] = image
        else:
            assert not isinstance(method, Finder)
            made = method.upscale(loaded.lr.to(device), scales)
        height, width = loaded.lr.shape[2:]
        checked = {}
        for scale in scales:
            where = f"{method.name} on {self.where} x{scale}"
            if files is not None:
                where += f" ({files[scale]})"
            checked[scale] = _checked(where, made.get(scale), (1, 3, height * scale, width * scale)).to(
                device
            )
        return checked

    def measured(self, result: Tensor, scale: int) -> Finished:
        truth, values = self.truth(scale), dict[str, float]()
        missing = []
        for column in self.run.of_image:
            values[column.key], reason = column.measure(result, truth, scale)
            if reason is not None:
                missing.append(reason)
        return Finished(values, list(self.loaded().notes), missing)

    def show(self, column: str, image: Tensor) -> None:
        assert self.run.sheet is not None
        scale = self.run.scales[-1]
        height, width = (side * scale for side in self.loaded().lr.shape[2:])
        self.run.sheet.add(f"{self.where} x{scale}", column, image, (height, width))


def _offered(method: Method | Finder, scales: Sequence[int]) -> list[int]:
    """Those of `scales` that a method has."""
    return [scale for scale in scales if scale in getattr(method, "scales", scales)]


def _checked(where: str, result: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if result is None:
        raise EvaluationError(f"{where}: no result")
    if tuple(result.shape) != shape:
        raise EvaluationError(f"{where}: expected shape {shape}, found {tuple(result.shape)}")
    if not result.isfinite().all():
        raise EvaluationError(f"{where}: the result has values that are not finite")
    return quantized(result.float())


def _write(path: Path, image: Tensor | None) -> None:
    assert image is not None
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    write_picture(path, Picture(np.ascontiguousarray(pixels)), "png", overwrite=True)


def _check_folder(folder: Path, names: Sequence[str]) -> None:
    """Raise EvaluationError where a folder holds more than the pictures of that name."""
    more = {path.name for path in folder.iterdir()} - {f"{file_name(name)}.png" for name in names}
    if more:
        raise EvaluationError(
            f"{folder}: expected the pictures of this run only, found {shown(sorted(more))}"
        )

"""`hitsr-fast train`: a model from a recipe and photos."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from hitsr_fast import env
from hitsr_fast.cli.options import check_settings
from hitsr_fast.train.config import Recipe

DONE, NOT_FINITE, REFUSED, DISK_FULL, STOPPED = 0, 1, 2, 28, 75
"""Exit codes, see docs/training.md."""


@dataclass(frozen=True)
class Train:
    """Train a model on photos by a recipe, phase after phase, and write it to RUN_FOLDER/model.

    Every value of the recipe is an option beside those below, by its name in the recipe: --seed 1,
    --tokenize.optim.lr 1e-3 for one phase, --optim.lr 1e-3 for all; --print shows them. The same command
    takes up an interrupted run where it stopped. Under torchrun it trains on all its processes.
    """

    recipe: tyro.conf.Positional[str]
    """Name of a recipe (hit-tiny, hit-d16, hit-d16-v2, hit-d16-tokenizer), or a JSON file."""

    data: tyro.conf.Positional[Path | None] = None
    """Folder of photos, as `hitsr-fast photos` makes it, or of WebDataset shards; with --data.sources PRESET
    the root of the preset's folders, see `hitsr-fast data check`."""

    run_folder: tyro.conf.Positional[Path | None] = None
    """Folder for checkpoints, log and the model; made if it is not there."""

    print: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the recipe with all its values as JSON, and do nothing else."""

    plan: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print what each phase would take in memory and time, and do nothing else."""

    gpus: int = 1
    """Number of GPUs that --plan is about."""

    rerun_stale: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train phases anew that were made with other values, photos or weights, and those after them."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto is cuda where there is a device."""

    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        """Train; return one of the exit codes above, with a line that says why where it is not 0."""
        try:
            return self._run()
        except FloatingPointError as error:
            return _said(str(error), NOT_FINITE)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return _said(str(error), DISK_FULL if full else REFUSED)
        except (ValueError, ModuleNotFoundError) as error:
            return _said(str(error), REFUSED)
        except SystemExit as stopped:
            if stopped.code != STOPPED:
                raise
            return _said("stopped by a signal, and saved; the same command goes on", STOPPED)

    def _run(self) -> int:
        from hitsr_fast.train.overrides import override

        check_settings()
        recipe = override(self._recipe(), self.overrides)
        if self.print:
            _say(recipe.to_json().rstrip())
            return DONE
        if self.plan:
            return self._plan(recipe)
        if self.data is None or self.run_folder is None:
            missing = "data" if self.data is None else "run_folder"
            raise ValueError(f"{missing}: expected `hitsr-fast train RECIPE DATA RUN_FOLDER`, found none")
        if recipe.data.workers:
            from hitsr_fast.train.server import start_server

            start_server()  # which imports torch while this process does
        from hitsr_fast.train.run import leave, train

        model = train(recipe, self.data, self.run_folder, device=self.device, rerun_stale=self.rerun_stale)
        leave()
        _say(f"wrote {model}")
        return DONE

    def _plan(self, recipe: Recipe) -> int:
        from hitsr_fast.train.plan import plan, table

        _say(table(plan(recipe, self.gpus)))
        return DONE

    def _recipe(self) -> Recipe:
        from hitsr_fast.train.recipes import load_recipe

        try:
            return load_recipe(self.recipe)
        except ValueError as error:
            if not Path(self.recipe).is_dir():
                raise
            run = "RUN_FOLDER" if self.data is None else self.data
            now = f"`hitsr-fast train hit-tiny {self.recipe} {run}`"
            raise ValueError(f"{error}; a recipe comes before the photos now: {now}") from error


def split(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The command's own arguments, and the options that are names of the recipe, with their values."""
    own = {f"--{field.name.replace('_', '-')}" for field in fields(Train)[3:-1]} | {"--help"}
    parts: tuple[list[str], list[str]] = ([], [])
    chosen = 0
    for word in words:
        if word.startswith("--"):
            chosen = 0 if word.partition("=")[0].replace("_", "-") in own else 1
        parts[chosen].append(word)
    return parts[0], tuple(parts[1])


def _said(message: str, code: int) -> int:
    """Say why the run ends, on the first process alone."""
    if env.rank() == 0:
        print(f"hitsr-fast train: {message}", file=sys.stderr)
    return code


def _say(message: str) -> None:
    if env.rank() == 0:
        print(message)

"""`hitsr-fast train`: a model from a folder of photos."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hitsr_fast.cli.options import check_settings
from hitsr_fast.train.config import Recipe


@dataclass(frozen=True)
class Train:
    """Train a model on the photos of a folder, stage after stage, and write it to RUN_FOLDER/model.

    The run folder keeps checkpoints and a log. The same command takes up an interrupted run where it stopped;
    finished stages are not run again.
    """

    photos: tyro.conf.Positional[Path]
    """Folder of photos, as `hitsr-fast photos` makes it."""

    run_folder: tyro.conf.Positional[Path]
    """Folder for checkpoints, log and the model; made if it is not there."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto is cuda where there is a device."""

    # Without a name of its own its fields are options of the command: --seed, --transformer.lr.
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    """What to train and how."""

    def run(self) -> int:
        """Train; return 0, or 2 if the arguments or the run folder are at fault or the loss is not finite."""
        from hitsr_fast.data.folder import NoPhotosError
        from hitsr_fast.pipeline import pick_device
        from hitsr_fast.train.loop import ResumeError
        from hitsr_fast.train.recipe import model_config, photo_split, train_model

        try:
            check_settings()
            device = pick_device(self.device)
            model_config(self.recipe)
            photo_split(self.recipe, self.photos)
        except ValueError as error:
            print(f"hitsr-fast train: {error}", file=sys.stderr)
            return 2
        try:
            train_model(self.recipe, self.photos, self.run_folder, device)
        except (OSError, FloatingPointError, NoPhotosError, ResumeError) as error:
            print(f"hitsr-fast train: {error}", file=sys.stderr)
            return 2
        print(f"wrote {self.run_folder / 'model'}")
        return 0

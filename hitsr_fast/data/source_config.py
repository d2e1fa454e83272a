"""What is drawn from where: sources of a data set and how their crops are cut; without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from hitsr_fast.configs import AnyCount, Config, Count, Range, Share

Role = Literal["train", "negative", "held-out"]


@dataclass(frozen=True)
class CropConfig(Config):
    """How a crop is drawn and cut.

    Args:
        draw: Which image: each alike ("image"), or each pixel alike ("area").
        cut: "random" takes a crop at any position; "resize-centre" resizes the image so that its shorter side
            is `shorter_side` (Lanczos, the longer side rounded down) and takes the centre.
        shorter_side: After that resizing, in pixels.
        centre: Side of the crop at the centre, which must be that of the model's crops.
        flip: Mirror every second crop, left to right.
        turns: Turn crops by quarter turns, each of the four alike.
        small: What becomes of an image whose shorter side is smaller than a crop: "enlarge" resizes it until
            that is a crop's (Lanczos), "reflect" continues it by its mirror images on the right and below,
            "leave out" takes none of it. "resize-centre" enlarges all below `shorter_side` by itself; "leave
            out" then leaves out those below a crop's side.
        sharpness_db: Draw a crop anew whose luma survives shrinking by four and back with this PSNR or more;
            None takes every crop.
        flat_fraction: Share of those crops that is kept nevertheless.
        tries: Most draws for a crop; after them the sharpest is taken.
    """

    draw: Literal["image", "area"] = "image"
    cut: Literal["random", "resize-centre"] = "random"
    shorter_side: Annotated[int, Range(8)] = 640
    centre: Annotated[int, Range(8)] = 512
    flip: bool = True
    turns: bool = False
    small: Literal["enlarge", "reflect", "leave out"] = "enlarge"
    sharpness_db: Annotated[float | None, Range(0, open="low")] = None
    flat_fraction: Share = 0.1
    tries: Count = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cut == "resize-centre":
            if self.small == "reflect":
                raise ValueError(
                    'small: expected "enlarge" or "leave out" with resize-centre, found "reflect"'
                )
            if self.shorter_side < self.centre:
                raise ValueError(
                    f"shorter_side: expected at least the centre of {self.centre}, found {self.shorter_side}"
                )


PLAIN = CropConfig(draw="area", turns=True, small="leave out", sharpness_db=32.0)
"""Of a folder of photos without a list of sources: sharp crops, by area, in all eight orientations."""


@dataclass(frozen=True)
class SourceConfig(CropConfig):
    """A set of images that is drawn from, and how.

    Args:
        name: In messages and in the log; each of a data set's sources has its own.
        path: A folder of images, a folder of .tar files (WebDataset shards) or a pattern of them, or
            `hf:NAME[:SPLIT[:COLUMN]]`, a data set of the package `datasets`, by default the split `train` and
            the column `image`. Relative to the data set's root.
        role: "train", "negative" (images of low quality, label 1) or "held-out" (never trained on).
        weight: Share of the samples that it gets, relative to the other sources of its kind; None, in all of
            them, is the number of its images, as if all were one list.
        limit: Take the first so many images by name; 0 takes all.
        scores: CSV file of scores of its images, relative to the root. Of a negative source only images below
            the threshold are taken, of another one those that are not; images without a score never are.
        score_file: Column with an image's name, its path in the source or its stem.
        score: Column with its score.
        below: Threshold; None is `below_share`.
        below_share: Threshold over the range of the scores: their least + below_share * (greatest - least).
    """

    name: str = "photos"
    path: str = "."
    role: Role = "train"
    weight: Annotated[float | None, Range(0, open="low")] = None
    limit: AnyCount = 0
    scores: str = ""
    score_file: str = "file"
    score: str = "score"
    below: float | None = None
    below_share: Annotated[float | None, Range(0, 1)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name: expected letters, digits and ._- alone, found {self.name!r}")
        if not self.path:
            raise ValueError(f"path: expected that of source {self.name!r}, found none")
        thresholds = sum(value is not None for value in (self.below, self.below_share))
        if thresholds != (1 if self.scores else 0):
            expected = (
                "one of below and below_share with scores" if self.scores else "no threshold without scores"
            )
            raise ValueError(f"scores: expected {expected}, found {thresholds} in source {self.name!r}")


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """Raise ValueError where sources do not fit together."""
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"sources: expected names of their own, found {twice[0]!r} twice")
    if sources and not any(source.role == "train" for source in sources):
        raise ValueError("sources: expected one to train on at least, found none of role train")
    for held_out in (False, True):
        drawn = [source for source in sources if (source.role == "held-out") == held_out]
        given = [source for source in drawn if source.weight is not None]
        if given and len(given) < len(drawn):
            other = next(source.name for source in drawn if source.weight is None)
            raise ValueError(f"sources: expected weights for all or for none, found none for {other!r}")

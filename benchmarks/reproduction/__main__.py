"""The command line `python -m benchmarks.reproduction PHOTOS RUNS`: trains, scores and prints the tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from benchmarks.reproduction.scores import RESULTS, read_rows, score_run, write_rows
from benchmarks.reproduction.tables import tables
from hitsr_fast.train.config import Recipe

HERE = Path(__file__).parent
TOKENIZER = "hierarchical"  # the phase that yields the tokenizer of all four transformers


@dataclass(frozen=True)
class Reproduce:
    """Train the phases of each seed, score what they yield, and print the tables."""

    photos: tyro.conf.Positional[Path]
    """Folder of photos, as `hitsr-fast photos` makes it."""

    runs: tyro.conf.Positional[Path]
    """Folder for the runs, two a seed; what is done there already is not done again."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each trains a tokenizer and four transformers."""

    crops: int = 96
    """Held-out crops that are scored."""

    results: Path = RESULTS
    """File to save the scores to."""

    score: bool = True
    """Score and print once trained; off, to train seeds in processes of their own."""

    def run(self) -> None:
        """Train, score, print."""
        from hitsr_fast.train.run import train

        for seed in self.seeds:
            for recipe, folder in recipes(self.runs, seed):
                train(recipe, self.photos, folder, device="cpu")
        if not self.score:
            return
        rows = [
            row
            for seed in self.seeds
            for row in score_run(recipes(self.runs, seed), TOKENIZER, self.photos, seed, self.crops)
        ]
        write_rows(self.results, rows)
        print(tables(read_rows(self.results)))


def recipes(runs: Path, seed: int) -> Iterator[tuple[Recipe, Path]]:
    """The recipes of a seed and the folders of their runs: hierarchical tokens, then plain ones.

    The second starts from the first's tokenizer. Its model differs in one key: plain tokens feed a
    transformer on the full grid, which they are made on.
    """
    hit = runs / f"seed-{seed}"
    yield replace(Recipe.from_json((HERE / "recipe.json").read_text()), seed=seed), hit
    plain = replace(Recipe.from_json((HERE / "plain.json").read_text()), seed=seed)
    phases = tuple(replace(p, init_from=(f"file:{hit / TOKENIZER / 'artifact'}",)) for p in plain.phases)
    yield replace(plain, phases=phases), runs / f"seed-{seed}-plain"


if __name__ == "__main__":
    tyro.cli(Reproduce).run()

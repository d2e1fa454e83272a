"""A folder of many photos, and what a training run on it takes: memory, time to the first step, waits."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


def write_folder(folder: Path, names: int, distinct: int, height: int, width: int) -> Path:
    """So many names of so many JPEGs, the others being hard links, which spares disk and time.

    Their pixels differ and are sharp: coarse colours, fine noise and rectangles; 0.3 bytes a pixel and more.
    """
    folder.mkdir(parents=True)
    files: list[Path] = []
    for number in range(names):
        path = folder / f"{number:05}.jpg"
        if number < distinct:
            Image.fromarray(_pixels(number, height, width)).save(path, quality=90)
            files.append(path)
        else:
            os.link(files[number % distinct], path)
    return folder


def _pixels(seed: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(1500):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        pixels[top : top + int(rng.integers(4, 60)), left : left + int(rng.integers(4, 60))] = rng.integers(
            0, 256, 3
        )
    noise = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


class Run(NamedTuple):
    """What a run took.

    Args:
        memory: Largest sum, in bytes, of the proportional set sizes of its processes (Linux; pages that
            several share count once, in parts).
        parts: That sum by process when it was largest, as (name, bytes).
        first: Seconds from its start to the end of its first step.
        waits: Share of each later step in which it waited for data.
        seconds: Of each later step.
    """

    memory: int
    parts: list[tuple[str, int]]
    first: float
    waits: list[float]
    seconds: list[float]


def train(data: Path, run: Path, words: Sequence[str]) -> Run:
    """`hitsr-fast train` on some data, watched."""
    command = [sys.executable, "-m", "hitsr_fast.cli", "train", "hit-tiny", str(data), str(run), *words]
    command[1:3] = ["-c", "from hitsr_fast.cli import main; main()"]
    started = time.time()
    process = subprocess.Popen(command, start_new_session=True)
    memory, parts = 0, list[tuple[str, int]]()
    while process.poll() is None:
        now = _memory(process.pid)
        if sum(size for _, size in now) > memory:
            memory, parts = sum(size for _, size in now), now
        time.sleep(0.2)
    assert process.returncode == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    times = [line["time"] for line in steps]
    return Run(
        memory,
        parts,
        times[0] - started,
        [line["data_wait"] for line in steps[1:]],
        [after - before for before, after in itertools.pairwise(times)],
    )


def _memory(group: int) -> list[tuple[str, int]]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
            name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
            if int(rest[2]) != group:
                continue
            rollup = status.with_name("smaps_rollup").read_text()
        except (OSError, ValueError):  # it has just ended
            continue
        line = next((line for line in rollup.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
        found.append((name, int(line.split()[1]) * 1024))
    return found

"""The README tells the truth: its code runs, its commands and links exist, its table is the measured one."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_code_runs(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (block,) = fenced("python")
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "osprey_x2.png").stat().st_size > 0


def test_make_commands_are_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", "".join(fenced("sh")), flags=re.MULTILINE))
    assert named == {"demo", "test"} and named <= targets


def test_commands_exist() -> None:
    from hitsr_fast.cli import Command

    named = set(re.findall(r"`hitsr-fast (\w+)", README)) | set(re.findall(r"bin/hitsr-fast (\w+)", README))
    known = {meta.name for arm in Command.__args__ for meta in arm.__metadata__}
    assert named and named <= known


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()


def test_table_is_the_measured_one() -> None:
    with (ROOT / "hitsr_fast/weights/hit-tiny/metrics.csv").open() as file:
        measured = {(row["set"], row["scale"], row["method"]): row for row in csv.DictReader(file)}
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in README.split("metrics.csv -->")[1].splitlines()
        if line.startswith("| Set")
    ]
    assert table
    for name, scale, *cells in table:
        for method, (psnr, distance) in zip(("bicubic", "hit-tiny"), (cells[:2], cells[2:]), strict=True):
            row = measured[name.replace(",", ""), scale.removeprefix("x"), method]
            assert psnr == f"{float(row['psnr_y']):.2f}"
            assert distance == f"{float(row['lpips']):.3f}"

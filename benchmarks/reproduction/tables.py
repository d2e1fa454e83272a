"""The tables of docs/reproduction.md, out of the rows, and whether the paper's orderings hold in them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.reproduction.scores import Row

TABLES = ("1a", "tokens", "2")
# Of each table the methods that the paper finds worse and better.
ORDERINGS = (
    ("1a", "plain*", "hierarchical"),
    ("tokens", "plain", "hierarchical"),
    ("2", "var", "hit-preference"),
    ("2", "var", "hit"),
    ("2", "var-preference", "hit-preference"),
    ("2", "hit", "hit-preference"),
    ("2", "var", "var-preference"),
)


def tables(rows: Sequence[Row]) -> str:
    """Markdown: a table of scores, mean and standard deviation over the seeds, and one of the orderings."""
    return "\n\n".join([*(_scores(name, rows) for name in TABLES), _orderings(rows)]) + "\n"


def _scores(table: str, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row.table == table]
    sides = sorted({row.side for row in own})
    head = [f"table {table}", *(f"PSNR-Y {side}" for side in sides), *(f"LPIPS {side}" for side in sides)]
    lines = [head, ["---"] * len(head)]
    for method in dict.fromkeys(row.method for row in own):
        cells = []
        for score, digits in (("psnr_y", 2), ("lpips", 3)):
            for side in sides:
                cells.append(_spread(_values(own, method, side, score), digits))
        lines.append([method, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _orderings(rows: Sequence[Row]) -> str:
    lines = [["table", "ordering", "score", "side", "seeds that agree", "mean difference"], ["---"] * 6]
    for table, worse, better in ORDERINGS:
        own = [row for row in rows if row.table == table]
        for score, sign, digits in (("psnr_y", 1, 2), ("lpips", -1, 3)):
            for side in sorted({row.side for row in own}):
                pairs = zip(_values(own, worse, side, score), _values(own, better, side, score), strict=True)
                differences = [b - a for a, b in pairs]
                agree = sum(sign * difference > 0 for difference in differences)
                share = f"{agree} of {len(differences)}"
                size = f"{mean(differences):+.{digits}f}"
                lines.append([table, f"{better} over {worse}", score, str(side), share, size])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _values(rows: Sequence[Row], method: str, side: int, score: str) -> list[float]:
    """Of each seed, in order."""
    own = sorted((row.seed, getattr(row, score)) for row in rows if (row.method, row.side) == (method, side))
    return [value for _, value in own]


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"

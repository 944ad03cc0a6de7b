"""Draws docs/fronts.svg from a result of `benchmarks/run.py fronts`: `python tools/fronts.py RESULT.json`."""

import json
import math
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "docs" / "fronts.svg"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 440, 64, 24, 150, 52
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31", "#7f7f7f")
LEAST, MOST = 1e-4, 10.0


def x(kl: float) -> float:
    """Where a loss lies, on a logarithmic scale."""
    share = math.log(min(max(kl, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def y(share: float) -> float:
    """Where a share of the dense cache's bytes lies."""
    return TOP + (1 - min(share, 1.0)) * (HEIGHT - TOP - BOTTOM)


def axes() -> list[str]:
    """Grid lines with their labels."""
    made = []
    for power in range(round(math.log10(LEAST)), round(math.log10(MOST)) + 1):
        at = x(10.0**power)
        label = f"{10.0**power:g}"
        made.append(f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}" class="grid"/>')
        made.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>')
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        made.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" class="grid"/>')
        made.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{percent} %</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    made.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">KL to dense, nats per token</text>')
    made.append(f'<text x="{LEFT}" y="14" text-anchor="start">bytes of the bf16 cache</text>')
    return made


def curve(row: dict[str, Any], colour: str, number: int) -> list[str]:
    """One front as a staircase, its points, and its name."""
    points = sorted((p["kl"], p["bytes"]) for p in row["front"])
    thick = 3 if row["who"] == "joint" else 1.5
    path, before = "", None
    for kl, share in points:
        path += f"M{x(kl):.1f} {y(share):.1f}" if before is None else f"H{x(kl):.1f}V{y(share):.1f}"
        before = share
    made = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"/>']
    made += [
        f'<circle cx="{x(kl):.1f}" cy="{y(share):.1f}" r="{thick + 1.5}" fill="{colour}"/>' for kl, share in points
    ]
    at = TOP + 12 + 20 * number
    made.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{at - 4}" r="5" fill="{colour}"/>')
    made.append(f'<text x="{WIDTH - RIGHT + 28}" y="{at}">{row["who"]}</text>')
    return made


def draw(told: dict[str, Any]) -> str:
    """The picture of the first seed."""
    rows = [row for row in told["rows"] if row["seed"] == 0]
    rows.sort(key=lambda row: row["who"] == "joint")
    style = "text{font:13px sans-serif;fill:#333}.grid{stroke:#ddd}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"><style>{style}</style>']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>')
    parts += axes()
    for number, row in enumerate(rows):
        parts += curve(row, "#000" if row["who"] == "joint" else COLOURS[number % len(COLOURS)], number)
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    OUT.write_text(draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8")

"""Run one case file and keep its figures: `python benchmarks/run.py attached [NAME=VALUE ...]`.

A case file in `cases/` defines `run(**settings) -> (facts, rows)`. What is printed last is a short table; the
same rows, with machine, versions, commit and settings, go to `results/<case>-<device>.json`.
"""

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def main() -> None:
    cases = sorted(path.stem for path in (HERE / "cases").glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=cases)
    parser.add_argument(
        "settings", nargs="*", metavar="NAME=VALUE", help="settings of the case, whole numbers or words"
    )
    parser.add_argument("--commit", help="the commit these files are of, where they lie outside a checkout")
    parser.add_argument("--out", type=Path, help="where to write; the default is results/<case>-<device>.json")
    given = parser.parse_args()
    written = {name: value for name, _, value in (item.partition("=") for item in given.settings)}
    settings: dict[str, Any] = {name: int(x) if x.isdecimal() else x for name, x in written.items()}
    began = time.monotonic()
    facts, rows = importlib.import_module(f"cases.{given.case}").run(**settings)
    facts |= {"commit": given.commit or facts["commit"], "seconds": time.monotonic() - began}
    device = "".join(c if c.isalnum() else "-" for c in facts["device"].lower()).strip("-")
    out = given.out or HERE / "results" / f"{given.case}-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"case": given.case, "facts": facts, "rows": rows}, indent=1) + "\n")
    table(rows)
    print(f"wrote {out}")


def table(rows: list[dict[str, Any]]) -> None:
    """Print the plain values of `rows`, one column a name."""
    names = [name for name, value in rows[0].items() if isinstance(value, (int, float, str))]
    cells = [names, *([f"{r[n]:.4g}" if isinstance(r[n], float) else str(r[n]) for n in names] for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()

"""Prints what the compiler makes of every kernel for a Hopper GPU, as a Markdown table; needs Triton, but no GPU.

`python tools/kernels.py [FUNCTION ...]`: of which functions of tests/launches.py; the default is all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import compiled


def main(functions: list[str]) -> None:
    print("| kernel | configuration | types | warps | stages | registers | spilled bytes | shared bytes | wgmma |")
    print("|---|---|---|---|---|---|---|---|---|")
    for function in functions or compiled.functions():
        for launch in compiled.report(function):
            chosen = " ".join(f"{name}={value}" for name, value in launch.constants.items())
            types = " ".join(sorted({kind.strip("*") for kind in launch.types.values() if kind.startswith("*")}))
            cells = [launch.kernel, chosen, types, launch.warps, launch.stages, launch.registers, launch.stack]
            cells += [launch.shared, "yes" if launch.wgmma else "no"]
            print("| " + " | ".join(str(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])

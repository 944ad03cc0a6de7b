"""What the compiler makes of a kernel for a Hopper GPU, without one: launches are compiled instead of run.

It runs in a process of its own, because Triton decides when a kernel is defined whether it is interpreted (as in the
other tests) or compiled. `python tools/registers.py` prints what it finds.
"""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "src" / "regard" / "kernels"
ARCHITECTURE = 90  # Hopper


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel in one configuration, and what it needs of the machine."""

    kernel: str
    constants: dict[str, Any]  # constexpr arguments
    types: dict[str, str]  # of all other arguments
    grid: tuple[int, ...]
    warps: int
    stages: int
    registers: int  # a thread
    stack: int  # bytes of local memory a thread: what was spilled
    shared: int  # bytes a program
    wgmma: bool  # whether Hopper's matrix instruction is used

    def __str__(self) -> str:
        chosen = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return (
            f"{self.kernel}[{chosen}] warps={self.warps} stages={self.stages} registers={self.registers} "
            f"spilled={self.stack} shared={self.shared} wgmma={'yes' if self.wgmma else 'no'}"
        )


def functions() -> list[str]:
    """Every function of `launches.py` that launches something."""
    names = import_module("launches").__dict__.items()
    return [name for name, made in names if callable(made) and made.__module__ == "launches" and name[0] != "_"]


def report(function: str) -> list[Launch]:
    """Compile, in a process of its own, what this function of `launches.py` launches.

    Raises:
        RuntimeError: something was refused by the compiler; its words are in the message.
    """
    return [Launch(**{**entry, "grid": tuple(entry["grid"])}) for entry in _apart(function)]


def launched() -> set[str]:
    """Names of all kernels that `launches.py` launches."""
    return set(_apart("--names"))


def kernels() -> set[str]:
    """Names of all kernels in the package that no other one calls or gives to its warps, read from its text."""
    made, called = set(), set()
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list):
                made.add(node.name)
                calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
                called |= {call.func.id for call in calls if isinstance(call.func, ast.Name)}
                ours = [part.func for part in calls if isinstance(part.func, ast.Attribute)]
                called |= {name.attr for name in ours if ast.unparse(name.value) != "tl"}
                called |= {name for call in calls for name in _partitions(call)}
    return made - called


def _partitions(call: ast.Call) -> Iterator[str]:
    """The functions that `warp_specialize([(function, arguments), ...], ...)` hands to groups of warps."""
    if isinstance(call.func, ast.Attribute) and call.func.attr == "warp_specialize":
        for part in ast.walk(call.args[0]):
            if isinstance(part, ast.Tuple) and isinstance(part.elts[0], ast.Name):
                yield part.elts[0].id


def _apart(argument: str) -> list[Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(SOURCES.parents[1]), str(TESTS), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    ran = subprocess.run([sys.executable, __file__, argument], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{argument} was not compiled:\n{ran.stderr[-4000:]}")
    return json.loads(ran.stdout)


@contextmanager
def intercepting(instead: Callable[..., None]) -> Iterator[None]:
    """Inside, a launch of a Triton kernel is `instead(kernel, grid, arguments, options)`, and nothing runs."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        instead(kernel, grid, arguments, options)

    saved, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = saved


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, every launch of a Triton kernel is compiled for a Hopper GPU and listed, and nothing runs.

    Tensors may be on any device, `meta` too. A configuration that was launched twice is listed once.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", ARCHITECTURE, 32)
    backend = make_backend(target)
    found: list[Launch] = []
    known = set()

    def build(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        # As JITFunction.run does, so that the compiler knows as much of the arguments as it will in earnest.
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*arguments, **options, debug=False)
        packed = kernel._pack_args(backend, options, bound, specialization, options)
        if (key := kernel.fn.__name__ + str(packed)) not in known:
            known.add(key)
            found.append(_build(kernel, tuple(grid(bound)) if callable(grid) else tuple(grid), target, *packed))

    with intercepting(build):
        yield found


def _build(kernel: Any, grid: Any, target: Any, options: Any, types: Any, constants: Any, attributes: Any) -> Launch:
    """Compile one configuration."""
    import triton
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(kernel, types, constants, attributes)
    made: Any = triton.compile(source, target=target, options=options.__dict__)
    chosen = {p.name: constants[(p.num,)] for p in kernel.params if p.is_constexpr and (p.num,) in constants}
    return Launch(
        kernel=kernel.fn.__name__,
        constants={name: value for name, value in chosen.items() if isinstance(value, bool | int | float | str)},
        types={name: str(kind) for name, kind in types.items() if kind != "constexpr"},
        grid=grid,
        warps=made.metadata.num_warps,
        stages=made.metadata.num_stages,
        shared=made.metadata.shared,
        wgmma="wgmma.mma_async" in made.asm["ptx"],
        **resources(made.asm["cubin"]),
    )


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of its stack, read from the machine code by the tool that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if not found:
        raise RuntimeError(f"no registers in {told!r}")
    return {"registers": int(found[1]), "stack": int(found[2])}


def main(argument: str) -> list[Any]:
    """What one function launches, or only the names of the kernels that any of them does (`--names`)."""
    launches = import_module("launches")
    if argument != "--names":
        with recording() as found:
            getattr(launches, argument)()
        return [dataclasses.asdict(launch) for launch in found]
    names = set()
    with intercepting(lambda kernel, *_: names.add(kernel.fn.__name__)):
        for function in functions():
            getattr(launches, function)()
    return sorted(names)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))

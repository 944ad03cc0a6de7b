"""The gated recurrence, forward and backward: milliseconds against flash-linear-attention, bytes and length.

Every problem is checked against the chunked form in float64 before it is timed: one of odd length by itself, and a
head of the very problem that is timed; what errs too much is not timed. Both sides get the same values, each in its
own layout, and take turns, launched behind a pause, so that the device alone is timed. Our first calls are timed in
processes of their own, each with an empty Triton cache; what fla's autotuner asks for is compiled ahead (ahead.py),
and it chooses in the process that is timed.
On a CPU this runs only where Triton interprets (TRITON_INTERPRET=1, `fla=0`), to show that it runs.
"""

import gc
import importlib
import importlib.metadata
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ahead import briefly, side_by_side
from cases.patterns import clock, settle
from cases.state_step import many
from regard.core.errors import RegardError
from regard.kernels.states.scan import scan
from regard.measure.seconds import spread
from regard.primitives.recurrence import chunked
from regard.search import facts

# What a decay belongs to, if the delta rule corrects; what is called of fla, and the name it has there for the gate.
KINDS = {
    "lightning": ("head", False, "simple_gla", "chunk_simple_gla", "g_gamma"),
    "gla": ("channel", False, "gla", "chunk_gla", "g"),
    "gated delta": ("token", True, "gated_delta_rule", "chunk_gated_delta_rule", "g"),
    "kda": ("channel", True, "kda", "chunk_kda", "g"),
}
# Bytes a second that one H200 copies, and tensors that must be read or written: (forward, backward).
BANDWIDTH = 4.27e12
UNITS = {"head": (4, 7), "token": (4, 7), "channel": (5, 9)}
# What bfloat16 may err by, in the norm; gradients of decays are differences of large sums.
MOST, MOST_DECAY = 0.03, 0.05
# Cycles of the pause in which the host gets ahead, 30 ms on an H200.
AHEAD = 60_000_000
# Milliseconds for which fla's autotuner times a configuration: there are some 700 of them.
TUNED = 20
COLUMNS = (
    "mechanism", "shape", "phase", "ours ms", "mad", "fla ms", "fla mad", "fla / ours", "over forward", "floor ms",
    "share of floor", "first s", "error", "fla error", "ns a token", "bytes a token", "says",
)  # fmt: skip
Call = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    device: torch.device
    heads: int
    width: int
    steps: int
    repeats: int
    odd: int


@dataclass(frozen=True)
class Side:
    """One package's call of one problem: `call(**given)` is its output; `turned`: tokens lie before heads."""

    call: Callable[..., Tensor]
    given: dict[str, Tensor]
    dout: Tensor
    turned: bool = False

    def forward(self) -> Tensor:
        """The output, without a graph."""
        with torch.no_grad():
            return self.call(**self.given)

    def kept(self) -> Call:
        """The backward alone, on a graph that is kept; returns the gradient of each input that has one."""
        leaves = {name: x.detach().requires_grad_(learned(x)) for name, x in self.given.items()}
        out = self.call(**leaves)
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        return lambda: dict(
            zip(wanted, torch.autograd.grad(out, [*wanted.values()], self.dout, retain_graph=True), strict=True)
        )


def run(
    kind: int = -1,
    fla: int = 1,
    long: int = 1,
    repeats: int = 10,
    steps: int = 4,
    heads: int = 16,
    width: int = 128,
    rows: int = 64,
    tokens: int = 131_072,
    odd: int = 700,
    shortest: int = 4096,
    longest: int = 524_288,
    patience: int = 120,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows for forward and backward at `rows` by `tokens / rows` and at 1 by `tokens`, then by length.

    Args:
        kind: which of `KINDS`, counted from 0; -1 for all.
        fla: 1 to time flash-linear-attention beside.
        long: 1 for forward with backward by length: doubling from `shortest` to an eighth of `longest`, and `longest`.
        repeats: timings of each side, taking turns.
        steps: calls in one timing.
        heads: of queries, keys and values.
        width: of a head.
        rows: of the batch of the first shape.
        tokens: of each shape, all rows together.
        odd: length of the problem of two heads that is checked first.
        shortest: length.
        longest: length.
        patience: seconds after which no more of fla's kernels are compiled ahead.

    Raises:
        RegardError: no such kind, fla cannot run here, or patience ended first.
    """
    names = list(KINDS)
    if not -1 <= kind < len(names):
        raise RegardError(f"kind is -1 for all or 0 to {len(names) - 1}, got {kind}")
    chosen = names if kind < 0 else [names[kind]]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if fla and (device.type == "cpu" or version("fla-core") is None):
        raise RegardError("fla=1 needs a GPU and fla-core; fla=0 times regard alone")
    shared = Setting(device, heads, width, steps, repeats, odd)
    told = facts.machine(torch.empty(0, device=device)) | {
        "heads": heads, "width": width, "steps": steps, "repeats": repeats, "dtype": "bfloat16", "odd length": odd,
        "most": MOST, "most of decays": MOST_DECAY, "bandwidth": BANDWIDTH,
    }  # fmt: skip
    told["versions"] |= {name: version(name) for name in ("triton", "fla-core")}
    lengths = [shortest << i for i in range(max(longest // 8 // shortest, 1).bit_length())] + [longest]
    shapes = ((rows, tokens // rows), (1, tokens))
    with tempfile.TemporaryDirectory() as folder:
        alone = first_calls(shared, folder, chosen, shapes)
        told["first calls"] = {" ".join(map(str, key)): value for key, value in alone.items()}
        if fla:
            told["ms a configuration of fla"] = TUNED
            told["compiled ahead"] = prepared(shared, folder, chosen, (min(rows, 16), shapes[0][1]), patience)
        return told, measured(shared, folder, chosen, shapes, lengths if long else [], alone, bool(fla))


def prepared(
    shared: Setting, folder: str, chosen: list[str], shape: tuple[int, int], patience: int
) -> dict[str, float]:
    """Compile what fla will ask for.

    Raises:
        RegardError: patience ended first.
    """
    print("compiling fla's kernels", flush=True)
    told = side_by_side(walk, shared, chosen, shape, folder=store(folder, "fla"), seconds=patience)
    print(told, flush=True)
    if told["late"]:
        raise RegardError(f"{told['late']} of fla's {told['met']} kernels were not compiled in {patience} s: raise it")
    return told


def walk(shared: Setting, chosen: list[str], shape: tuple[int, int]) -> None:
    """All calls of fla, on few rows: of their number its kernels are told whether 16 divides it."""
    for name in chosen:
        tried(theirs(name, *inputs(shared, name, shape[0], shared.heads, shape[1])))


def measured(
    shared: Setting, folder: str, chosen: list[str], shapes: tuple[tuple[int, int], ...], lengths: list[int],
    alone: dict[Any, dict[str, Any]], fla: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """All rows."""
    made: list[dict[str, Any]] = []
    # What fla's autotuner found on another day is not kept either.
    os.environ["FLA_CACHE_RESULTS"] = "0"
    for name in chosen:
        for B, T in shapes:
            print(f"{name} B{B} T{T}", flush=True)
            made += compare(shared, name, B, T, folder, alone, fla)
    for name in chosen:
        made += [length(shared, name, T, store(folder, "ours", name, *shapes[1])) for T in lengths]
    return made


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def inputs(shared: Setting, name: str, B: int, H: int, T: int) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of a scan, drawn on the device, and the gradient of its output; gates by channel are bfloat16."""
    torch.manual_seed(0)
    kind, delta, *_ = KINDS[name]
    normal = lambda *shape, dtype: torch.randn(*shape, dtype=dtype, device=shared.device)  # noqa: E731
    wide = lambda: normal(B, H, T, shared.width, dtype=torch.bfloat16)  # noqa: E731
    given = {"q": wide(), "k": F.normalize(wide(), dim=-1), "v": wide()}
    if kind == "head":
        given["decay"] = torch.linspace(-0.001, -1, H, device=shared.device)
    else:
        given["decay"] = F.logsigmoid(wide() if kind == "channel" else normal(B, H, T, dtype=torch.float32))
    if delta:
        given["beta"] = normal(B, H, T, dtype=torch.float32).sigmoid()
    return given, wide()


def learned(x: Tensor) -> bool:
    """Whether a gradient is wanted: of all but the fixed decays of heads."""
    return x.dim() > 1


def ours(name: str, given: dict[str, Tensor], dout: Tensor) -> Side:
    scale, delta = dout.shape[-1] ** -0.5, KINDS[name][1]
    return Side(lambda **x: scan(**x, delta=delta, scale=scale)[0], given, dout)


def theirs(name: str, given: dict[str, Tensor], dout: Tensor) -> Side:
    """The same by fla, whose copies of the same values lay tokens before heads."""
    *_, module, function, gate = KINDS[name]
    call = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    turn = lambda x: x.transpose(1, 2).contiguous() if x.dim() > 1 else x  # noqa: E731
    renamed = {gate if key == "decay" else key: turn(x) for key, x in given.items()}
    scale = dout.shape[-1] ** -0.5
    return Side(lambda **x: call(**x, scale=scale)[0], renamed, turn(dout), turned=True)


SIDES = {"ours": ours, "fla": theirs}


def store(folder: str, *job: str | int) -> str:
    """The Triton cache of one of our first calls, or of all that is fla's."""
    return str(Path(folder, "-".join(map(str, job)).replace(" ", "-")))


@contextmanager
def compiled(folder: str) -> Iterator[None]:
    """Triton keeps what it compiles in `folder`."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = before


def first_calls(
    shared: Setting, folder: str, chosen: list[str], shapes: tuple[tuple[int, int], ...]
) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Seconds of our first calls, and errors at the odd length, by mechanism, rows and tokens of a row."""
    jobs = [(name, B, T) for B, T in (*shapes, (1, shared.odd)) for name in chosen]
    print(f"{len(jobs)} first calls", flush=True)
    spawn = multiprocessing.get_context("spawn")
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        made = [pool.submit(first_call, shared, *job, store(folder, "ours", *job)) for job in jobs]
        return {job: future.result() for job, future in zip(jobs, made, strict=True)}


def first_call(shared: Setting, name: str, B: int, T: int, folder: str) -> dict[str, Any]:
    """What a fresh process needs for forward and backward, compilation included; errors if T is the odd length."""
    given, dout = inputs(shared, name, B, 2 if shared.odd == T else shared.heads, T)
    made = ours(name, given, dout)
    with compiled(folder):
        began = time.perf_counter()
        out, gradients, says = tried(made)
        told = {"seconds": time.perf_counter() - began, "says": says}
    if shared.odd == T:
        told["errors"] = errors(name, exact(name, given, dout), made, out, gradients)
    return told


def tried(side: Side) -> tuple[Tensor | None, dict[str, Tensor], str]:
    """Output and gradients, as far as the call gives them, and what it says where it refuses."""
    out = None
    try:
        out = side.forward()
        gradients = side.kept()()
        settle()
        return out, gradients, ""
    except Exception as error:  # whatever another package raises is its answer
        return out, {}, f"{type(error).__name__}: {error}"


def part(x: Tensor, heads: int | None) -> Tensor:
    """All, or `heads` heads of the first row."""
    return (x[:heads] if x.dim() == 1 else x[:1, :heads]) if heads else x


def exact(name: str, given: dict[str, Tensor], dout: Tensor, heads: int | None = None) -> dict[str, Tensor]:
    """Output and gradients in float64, of all or of `heads` heads of the first row."""
    leaves = {key: part(x, heads).double().requires_grad_(learned(x)) for key, x in given.items()}
    out = chunked(**leaves, delta=KINDS[name][1], scale=dout.shape[-1] ** -0.5)[0]
    wanted = {key: x for key, x in leaves.items() if x.requires_grad}
    slopes = torch.autograd.grad(out, [*wanted.values()], part(dout, heads).double())
    return {"out": out.detach()} | dict(zip(wanted, slopes, strict=True))


def errors(
    name: str, known: dict[str, Tensor], side: Side, out: Tensor | None, gradients: dict[str, Tensor],
    heads: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Relative error, in the norm, of output and gradients against `exact`."""
    gate = KINDS[name][4]
    found = {"decay" if side.turned and key == gate else key: x for key, x in gradients.items()}
    if out is not None:
        found["out"] = out
    straight = {key: part(x.transpose(1, 2) if side.turned else x, heads).double() for key, x in found.items()}
    return {key: ((x - known[key]).norm() / known[key].norm()).item() for key, x in straight.items()}


def compare(
    shared: Setting, name: str, B: int, T: int, folder: str, alone: dict[Any, dict[str, Any]], fla: bool
) -> list[dict[str, Any]]:
    """Check, then time both sides; a row for each phase.

    Raises:
        RegardError: our call failed.
    """
    given, dout = inputs(shared, name, B, shared.heads, T)
    sides = {side: SIDES[side](name, given, dout) for side in (("ours", "fla") if fla else ("ours",))}
    odd = alone[name, 1, shared.odd]
    wrong: dict[str, dict[str, float]] = {"ours, odd length": odd["errors"]}
    says: dict[str, str] = {}
    known = exact(name, given, dout, heads=1)
    for key, side in sides.items():
        cache = store(folder, "ours", name, B, T) if key == "ours" else store(folder, "fla")
        with compiled(cache), briefly(TUNED):
            out, gradients, says[key] = tried(side)
        wrong[key] = errors(name, known, side, out, gradients, heads=1)
        del out, gradients
    if failed := odd["says"] or says["ours"]:
        raise RegardError(f"{name} B{B} T{T}: {failed}")
    refused = too_wrong(wrong["ours, odd length"]) or too_wrong(wrong["ours"])
    told = {
        "mechanism": name, "shape": f"B{B} T{T}", "error": max(wrong["ours"].values()),
        "fla error": max(wrong.get("fla", {}).values(), default=""), "errors": wrong,
        "first s": alone[name, B, T]["seconds"],
    }  # fmt: skip
    if refused:
        return [row(told | {"phase": phase, "says": refused}) for phase in ("forward", "backward")]
    phases = {
        "forward": {key: side.forward for key, side in sides.items() if "out" in wrong[key]},
        "backward": {key: side.kept() for key, side in sides.items() if not says[key]},
    }
    made: list[dict[str, Any]] = []
    for phase, units in zip(phases, UNITS[KINDS[name][0]], strict=True):
        timed = turns(phases[phase], shared)
        floor = units * dout.nbytes / BANDWIDTH * 1e3
        silent = says.get("fla", "") if fla and "fla" not in timed else ""
        over = {"over forward": timed["ours"].median / made[0]["ours ms"]} if made else {}
        made.append(row(told | figures(timed, floor, B * T) | over | {"phase": phase, "says": silent}))
    return made


def too_wrong(found: dict[str, float]) -> str:
    """Why a row is not timed, or nothing."""
    bad = [f"{key} {x:.1e}" for key, x in found.items() if not x <= (MOST_DECAY if key == "decay" else MOST)]
    return f"ours errs: {', '.join(bad)}" if bad else ""


def figures(timed: dict[str, Any], floor: float, tokens: int) -> dict[str, Any]:
    """Columns of one phase; `timed`: milliseconds by side."""
    ours = timed["ours"]
    made = {
        "ours ms": ours.median, "mad": ours.mad, "ns a token": ours.median / tokens * 1e6, "floor ms": floor,
        "share of floor": floor / ours.median, "timings": {side: asdict(found) for side, found in timed.items()},
    }  # fmt: skip
    if "fla" in timed:
        fla = timed["fla"]
        paired = spread([b / a for a, b in zip(ours.values, fla.values, strict=True)])
        made |= {"fla ms": fla.median, "fla mad": fla.mad, "fla / ours": paired.median}
        made["timings"]["fla / ours"] = asdict(paired)
    return made


def row(told: dict[str, Any]) -> dict[str, Any]:
    """All columns, in order; nothing where there is no figure."""
    return {name: told.get(name, "") for name in COLUMNS} | {key: x for key, x in told.items() if key not in COLUMNS}


def length(shared: Setting, name: str, T: int, folder: str) -> dict[str, Any]:
    """Forward with backward at one row of `T` tokens: time and peak memory a token, inputs included."""
    print(f"{name} T{T}", flush=True)
    gc.collect()
    given, dout = inputs(shared, name, 1, shared.heads, T)
    side = ours(name, given, dout)

    def both() -> None:
        side.kept()()

    with compiled(folder):
        both()
    peak: float | str = ""
    if dout.is_cuda:
        settle()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        both()
        settle()
        peak = torch.cuda.max_memory_allocated() / T
    floor = sum(UNITS[KINDS[name][0]]) * dout.nbytes / BANDWIDTH * 1e3
    told = figures(turns({"ours": both}, shared), floor, T)
    return row(told | {"mechanism": name, "shape": f"B1 T{T}", "phase": "forward + backward", "bytes a token": peak})


def turns(calls: dict[str, Call], shared: Setting) -> dict[str, Any]:
    """Milliseconds of one call of each side, spread over the repeats, sides taking turns."""
    found: dict[str, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        clock(call, AHEAD)
    for _ in range(shared.repeats):
        for side, call in calls.items():
            found[side].append(clock(many(call, shared.steps), AHEAD) / shared.steps)
    return {side: spread(values) for side, values in found.items()}

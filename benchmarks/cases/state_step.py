"""One decode step of the gated recurrence: seconds, and bytes a second against a plain copy of the same state.

Every gate is first compared with the definition in float64. Then the kernel, the step of flash-linear-attention where
that is installed, and the copy take turns, replayed from a CUDA graph ("graph") and launched from Python ("launch").
Smaller states stay in the GPU's cache between steps, as they would not in a model; only the largest batch says what
memory does. On a CPU this runs only where Triton interprets (TRITON_INTERPRET=1), to show that it runs.
"""

import importlib
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.kernels.states.step import step
from regard.measure.seconds import spread
from regard.search import facts

BATCHES = (1, 16, 64)
# What is called of fla for the same gates, and the name it has there for the gate.
OTHERS = {
    "lightning": ("simple_gla.fused_recurrent", "fused_recurrent_simple_gla", "g_gamma"),
    "gla": ("gla.fused_recurrent", "fused_recurrent_gla", "gk"),
    "gated delta": ("gated_delta_rule.fused_recurrent", "fused_recurrent_gated_delta_rule", "g"),
    "kda": ("kda.fused_recurrent", "fused_recurrent_kda", "g"),
}
MOST = 1e-2  # what a bfloat16 result may err by, of its largest entry
Call = Callable[[], Any]


def run(
    batch: int = 0, heads: int = 16, width: int = 128, steps: int = 50, repeats: int = 20
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for every batch (`batch=0`: 1, 16 and 64), mechanism and way of launching.

    Args:
        batch: rows.
        heads: of queries, keys and values.
        width: of a head; the state is `width` by `width`.
        steps: in one timing.
        repeats: timings of each side, taking turns.

    Raises:
        RegardError: a result is not that of the definition.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = facts.machine(torch.empty(0, device=device)) | {
        "heads": heads, "width": width, "steps": steps, "repeats": repeats, "dtype": "bfloat16", "state": "float32",
    }  # fmt: skip
    told["versions"] |= {name: version(name) for name in ("triton", "fla-core")}
    rows = []
    with torch.no_grad():
        for B in [batch] if batch else BATCHES:
            for name in OTHERS:
                rows += compare(name, inputs(name, B, heads, width, device), steps, repeats)
    return told, rows


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def inputs(name: str, B: int, H: int, D: int, device: torch.device) -> dict[str, Any]:
    """One token for `step`, drawn once; keys have length one, as the delta rule needs them."""
    drawn = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=drawn)  # noqa: E731
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
    gate = {"lightning": (H,), "gated delta": (B, H, 1)}.get(name, (B, H, 1, D))
    made = {
        "q": unit(normal(B, H, 1, D)).bfloat16(),
        "k": unit(normal(B, H, 1, D)).bfloat16(),
        "v": normal(B, H, 1, D).bfloat16(),
        "decay": -normal(*gate).abs() / 16,
        "state": normal(B, H, D, D),
    }
    if delta := name in ("gated delta", "kda"):
        made["beta"] = normal(B, H, 1).sigmoid()
    return {key: x.to(device) for key, x in made.items()} | {"delta": delta}


def compare(name: str, given: dict[str, Any], steps: int, repeats: int) -> list[dict[str, Any]]:
    """Check both sides, then time both and the copy; a row for each way of launching."""
    sides: dict[str, Call] = {"ours": lambda: step(**given)}
    if other := theirs(name, given):
        sides["fla"] = other
    errors = check(given, sides)
    state = given["state"]
    into = torch.empty_like(state)
    sides["copy"] = lambda: into.copy_(state)
    moved = 2 * state.nbytes + sum(x.nbytes for x in given.values() if torch.is_tensor(x) and x is not state)
    moved += given["v"].nbytes
    rows = []
    for way in ("graph", "launch") if state.is_cuda else ("launch",):
        timed = {side: spread(values) for side, values in turns(sides, way, steps, repeats).items()}
        ours, copy = timed["ours"].median, timed["copy"].median
        rows.append({
            "mechanism": name,
            "batch": state.shape[0],
            "way": way,
            "ours us": ours * 1e6,
            "fla us": timed["fla"].median * 1e6 if "fla" in timed else float("nan"),
            "copy us": copy * 1e6,
            "TB/s": moved / ours / 1e12,
            "copy TB/s": 2 * state.nbytes / copy / 1e12,
            "share of copy": moved / ours / (2 * state.nbytes / copy),
            "error": errors["ours"],
            "errors": errors,
            "bytes": moved,
            "seconds": {side: vars(found) for side, found in timed.items()},
        })  # fmt: skip
    return rows


def theirs(name: str, given: dict[str, Any]) -> Call | None:
    """The same step by fla, which lays tokens before heads and makes a new state; None where it cannot run."""
    if not given["q"].is_cuda or version("fla-core") is None:
        return None
    module, function, gate = OTHERS[name]
    call = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    ordered = {key: given[key].transpose(1, 2).contiguous() for key in ("q", "k", "v", "beta") if key in given}
    decay = given["decay"] if given["decay"].dim() == 1 else given["decay"].transpose(1, 2).contiguous()
    options = ordered | {gate: decay, "initial_state": given["state"], "scale": 1.0, "output_final_state": True}
    return lambda: call(**options)


def check(given: dict[str, Any], sides: dict[str, Call]) -> dict[str, float]:
    """What each side errs by, output and state, against the definition in float64; `given` is left as it was."""
    state = given["state"]
    begun = state.clone()
    out, after = definition(**given)
    errors = {}
    for side, call in sides.items():
        found = call()
        found, held = (found, state) if side == "ours" else (found[0].transpose(1, 2), found[1])
        errors[side] = max(error(found, out), error(held, after))
        state.copy_(begun)
    if not errors["ours"] <= MOST:
        raise RegardError(f"the kernel errs by {errors['ours']:.1e} of the largest entry, more than {MOST}")
    return errors


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def definition(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, delta: bool, beta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and state in float64."""
    q, k, v, decay = (x.double() for x in (q, k, v, decay))
    kept = decay.exp()[:, None, None] if decay.dim() == 1 else decay.exp().reshape(*decay.shape[:2], -1, 1)
    S = state.double() * kept
    written = v - k @ S if delta else v
    S = S + k.mT @ (written if beta is None else beta.double()[..., None] * written)
    return q @ S, S


def turns(sides: dict[str, Call], way: str, steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of one call of each side, `repeats` times, taking turns."""
    runs = {side: graph(call, steps) if way == "graph" else many(call, steps) for side, call in sides.items()}
    found: dict[str, list[float]] = {side: [] for side in sides}
    for run in runs.values():
        clock(run)
    for _ in range(repeats):
        for side, run in runs.items():
            found[side].append(clock(run) / steps)
    return found


def many(call: Call, steps: int) -> Call:
    def run() -> None:
        for _ in range(steps):
            call()

    return run


def graph(call: Call, steps: int) -> Call:
    """All `steps` calls as one CUDA graph, so that nothing but the GPU is timed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    kept = torch.cuda.CUDAGraph()
    with torch.cuda.graph(kept):
        many(call, steps)()
    return kept.replay


def clock(run: Call) -> float:
    """Seconds until everything `run` started has finished."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3

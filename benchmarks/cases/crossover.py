"""From how many pairs on lists of blocks pay: `attend` by blocks against `attend` by torch's fused kernels with a mask.

Both are launched from Python, as a model launches them, with lists of blocks and masks as `attend` keeps or makes them.
Every result is first compared with the definition in float64, gradients included. It is what `ops/blocks.py: PAIRS`
should be set from. Needs a GPU.
"""

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cases.state_step import turns
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.measure.seconds import spread
from regard.ops.attention import attend
from regard.search import facts

SIDES = ("block", "sdpa")
MOST = 0.02  # relative error in the norm, of bfloat16 results and gradients
WINDOW = 256


def run(
    first: int = 256, last: int = 4096, heads: int = 16, width: int = 128, steps: int = 20, repeats: int = 9
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for every pattern, number of tokens and phase ("both": forward and backward).

    Args:
        first: tokens of the shortest text; each next one is twice as long.
        last: tokens of the longest.
        heads: of queries, keys and values.
        width: of a head.
        steps: calls in one timing.
        repeats: timings of each side, taking turns.

    Raises:
        RegardError: no GPU, or a result is not that of the definition.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = facts.machine(torch.empty(0, device=device)) | {
        "heads": heads, "width": width, "steps": steps, "repeats": repeats, "dtype": "bfloat16",
    }  # fmt: skip
    told["versions"] |= {"triton": importlib.metadata.version("triton")}
    rows, tokens = [], first
    while tokens <= last:
        for name, pattern in patterns(tokens, device).items():
            rows += measured(name, pattern, tokens, heads, width, device, steps, repeats)
        tokens *= 2
    return told, rows


def patterns(tokens: int, device: torch.device) -> dict[str, Pattern]:
    """One that lets torch skip keys, and one that does not."""
    blocks = -(-tokens // 128)
    table = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.25
    table.fill_diagonal_(True)
    return {
        f"window {WINDOW}": Pattern.window(WINDOW),
        "a quarter of blocks": Pattern.blocks(table.to(device), 128, causal=False),
    }


def measured(
    name: str, pattern: Pattern, tokens: int, heads: int, width: int, device: torch.device, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """Check both sides, then time both; a row for each phase."""
    torch.manual_seed(0)
    *given, dout = (torch.randn(1, heads, tokens, width, device=device, dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in given]
    exact = learned([x.detach()[:, :2].double().requires_grad_() for x in leaves], dout[:, :2].double(), pattern,
                    "reference")  # fmt: skip
    errors = {}
    for side in SIDES:
        pairs = zip(learned(leaves, dout, pattern, side), exact, strict=True)
        errors[side] = max(((found[:, :2].double() - wanted).norm() / wanted.norm()).item() for found, wanted in pairs)
        if not errors[side] <= MOST:
            raise RegardError(f"backend {side!r} errs by {errors[side]:.1e} on {name}, more than {MOST}")
    phases: dict[str, Callable[..., Any]] = {
        "forward": partial(forward, leaves),
        "both": partial(learned, leaves, dout),
    }
    rows = []
    for phase, call in phases.items():
        timed = turns({side: partial(call, pattern, side) for side in SIDES}, "launch", steps, repeats)
        found = {side: spread(values) for side, values in timed.items()}
        paired = [b / a for a, b in zip(timed["block"], timed["sdpa"], strict=True)]
        rows.append(
            {"pattern": name, "tokens": tokens, "pairs": tokens**2, "phase": phase}
            | {f"{side} us": found[side].median * 1e6 for side in SIDES}
            | {"sdpa / block": spread(paired).median, "errors": errors}
            | {"seconds": {side: vars(found[side]) for side in SIDES}}
        )
    return rows


@torch.no_grad()
def forward(leaves: list[Tensor], pattern: Pattern, backend: str) -> Tensor:
    return attend(*leaves, pattern=pattern, backend=backend)[0]


def learned(leaves: list[Tensor], dout: Tensor, pattern: Pattern, backend: str) -> tuple[Tensor, ...]:
    """Output and gradients."""
    out, _ = attend(*leaves, pattern=pattern, backend=backend)
    return out, *torch.autograd.grad(out, leaves, dout)

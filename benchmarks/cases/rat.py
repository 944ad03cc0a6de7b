"""A RAT layer against an attention layer of equal width: forward, and forward with backward, by chunk.

On a GPU in bfloat16, by default at 100,000 tokens, else on a CPU in float32 at 4,096. Attention is torch's, without
positions, in a layer that does nothing else; both layers project in and out. Pairs are interleaved. Before it is timed
the RAT layer must agree with itself in float64.
`tokens`, `width`, `heads` of 0: those of the device; `chunk` of 0: 16 and 64.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from regard.core.errors import RegardError
from regard.layers.states.rat import Mixer
from regard.measure.seconds import spread
from regard.search import facts

SETTINGS = {"cuda": (100_000, 2048, 16), "cpu": (4096, 512, 8)}
CHUNKS = (16, 64)
MOST = 8  # roundings that a layer may err by


class Attention(nn.Module):
    """The least that an attention layer does."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.inputs, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, width]` to the same."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.inputs(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def run(
    tokens: int = 0, width: int = 0, heads: int = 0, chunk: int = 0, repeats: int = 5, backward: int = 1
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Milliseconds of both layers and the ratio attention / RAT, medians of interleaved pairs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usual = SETTINGS[device.type]
    tokens, width, heads = (given or known for given, known in zip((tokens, width, heads), usual, strict=True))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    attention = Attention(width, heads).to(device, dtype)
    x = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=bool(backward))
    settings = {"tokens": tokens, "width": width, "heads": heads, "dtype": str(dtype), "repeats": repeats}
    told = facts.machine(SimpleNamespace(device=device)) | settings | {"sdpa": kernel(attention, x)}
    rows = []
    for size in (chunk,) if chunk else CHUNKS:
        mixer = Mixer(width, heads, chunk=size).to(device, dtype)
        told[f"error, chunk {size}"] = error(mixer, x)
        for phase in ("forward", "forward + backward")[: 1 + bool(backward)]:
            rows.append(row(f"chunk {size}, {phase}", attention, mixer, x, phase, repeats))
    return told, rows


def kernel(attention: Attention, x: Tensor) -> str:
    """Which of its kernels torch takes for this attention."""
    q = x.detach().unflatten(-1, (attention.heads, -1)).transpose(1, 2).requires_grad_(x.requires_grad)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name


def error(mixer: Mixer, x: Tensor) -> float:
    """What the layer errs by on some of these tokens, output and gradient, against float64.

    Raises:
        RegardError: too much to be timed.
    """
    results = []
    for layer, given in ((mixer, x), (copy.deepcopy(mixer).double(), x.double())):
        given = given[:, :1000].detach().requires_grad_()
        y = layer(given)
        results.append((y.detach(), *torch.autograd.grad(y, given, torch.ones_like(y))))
    found = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    if not found <= MOST * torch.finfo(x.dtype).eps:
        raise RegardError(f"a RAT layer with chunk {mixer.chunk} errs by {found:.2e} in {x.dtype}")
    return found


def row(name: str, attention: nn.Module, mixer: nn.Module, x: Tensor, phase: str, repeats: int) -> dict[str, Any]:
    """One chunk and phase: medians of paired ratios, and everything they come from."""
    layers = (attention, mixer)
    times: tuple[list[float], ...] = ([], [])
    peaks = [0, 0]
    for repeat in range(repeats + 1):
        for i, layer in enumerate(layers):
            seconds, peak = timed(lambda layer=layer: once(layer, x, phase != "forward"), x.device)
            # The first of each compiles and warms up.
            if repeat:
                times[i].append(1000 * seconds)
                peaks[i] = max(peaks[i], peak)
    ratio = spread([a / b for a, b in zip(*times, strict=True)])
    return {
        "what": name,
        "attention ms": statistics.median(times[0]),
        "rat ms": statistics.median(times[1]),
        "ratio": ratio.median,
        "ratio mad": ratio.mad,
        "attention MiB": peaks[0] / 2**20,
        "rat MiB": peaks[1] / 2**20,
        "pairs": repeats,
        "timings": {"attention": asdict(spread(times[0])), "rat": asdict(spread(times[1])), "ratio": asdict(ratio)},
    }


def once(layer: nn.Module, x: Tensor, backward: bool) -> None:
    """One pass; gradients of the input and of all weights, then dropped."""
    with torch.set_grad_enabled(backward):
        y = layer(x)
    if backward:
        y.backward(torch.ones_like(y))
        x.grad = None
        layer.zero_grad()


def timed(call: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """Seconds of `call`, and on a GPU its peak memory in bytes (else 0)."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, 0
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device)

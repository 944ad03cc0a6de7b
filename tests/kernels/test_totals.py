"""Sums of probabilities over tiles of rows by the kernel, against plain torch in float64."""

import pytest
import torch

pytest.importorskip("triton")

from regard.core.pattern import Pattern
from regard.kernels import device
from regard.kernels.attention.totals import totals
from regard.ops import totals as op
from regard.ops.attention import attend
from running import DEVICE, FLOATS, close, drawn


def made(B, H, Hk, T, S, D, dtype, pattern, padded):
    """q, k, their lse in float64, and which arrivals are real."""
    make = drawn(0)
    q, k = make(B, H, T, D).to(dtype), make(B, Hk, S, D).to(dtype)
    real = torch.ones(B, S, dtype=torch.bool)
    real[0, :padded] = False
    places = torch.where(real, torch.arange(S), -1)
    call = {"q_positions": places[:, S - T :], "k_positions": places, "scale": 0.3, "backend": "reference"}
    lse = attend(q.double(), k.double(), k.double(), pattern=pattern, **call)[1]
    return q, k, lse, real


@pytest.mark.parametrize(
    ("shape", "tiles", "window", "dtype", "padded"),
    [
        ((2, 4, 2, 90, 90, 16), 7, None, torch.float32, 33),
        ((1, 2, 1, 60, 150, 64), 60, None, torch.bfloat16, 0),
        ((2, 2, 2, 140, 140, 32), 3, 20, torch.float32, 5),
    ],
)
def test_equals_the_definition(monkeypatch, shape, tiles, window, dtype, padded):
    """Grouped heads, rows that begin late, single rows, windows, padding, tiles of unequal size."""
    if DEVICE == "cpu":
        monkeypatch.setattr(device, "refuses", lambda tensor: None)
    B, H, Hk, T, S, D = shape
    pattern = Pattern.causal() if window is None else Pattern.window(window)
    q, k, lse, real = made(B, H, Hk, T, S, D, dtype, pattern, padded)
    call = {"tiles": tiles, "real": real, "scale": 0.3, "first": S - T, "window": window}
    assert op.refuses(q.double(), k.double(), None)
    mass, entropy = op.totals(q.double(), k.double(), lse, **call)
    q, k, lse, real = q.to(DEVICE), k.to(DEVICE), lse.float().to(DEVICE), real.to(DEVICE)
    assert op.refuses(q, k, None) is None
    found, spread = op.totals(q, k, lse, **call | {"real": real})
    most = FLOATS[torch.float32] * 4
    close(found, mass, most)
    close(spread, entropy, most)
    rows = real[:, S - T :].sum(1).cpu()
    torch.testing.assert_close(mass.sum((2, 3)), rows[:, None].double().expand(B, H))
    again = totals(q, k, lse, real=real, tiles=tiles, scale=0.3, first=S - T, window=window, entropy=False)
    assert again[1] is None


def test_refused():
    q = torch.zeros(1, 2, 4, 24, device=DEVICE)
    assert op.refuses(q, q, 5.0) == "the kernel has no softcap"
    if DEVICE == "cuda":
        assert "D of 16, 32" in op.refuses(q, q, None)

"""Random inputs of gated recurrences for tests, float64 unless said."""

import torch

KINDS = ("none", "head", "token", "key channel", "channel")


def tokens(B=2, Hk=2, H=4, T=37, D=5, Dv=3, dtype=torch.float64, seed=0):
    """q, k of norm 1, v."""
    drawn = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, Hk, T, D, generator=drawn, dtype=dtype) for _ in range(2))
    return q, torch.nn.functional.normalize(k, dim=-1), torch.randn(B, H, T, Dv, generator=drawn, dtype=dtype)


def decays(kind, q, v, seed=1):
    """Log-decays of a kind for `q [B, Hk, T, D]` and `v [B, H, T, Dv]`."""
    (B, Hk, T, D), H = q.shape, v.shape[1]
    shapes = {"head": (H,), "token": (B, H, T), "key channel": (B, Hk, T, D), "channel": (B, H, T, D)}
    if kind == "none":
        return None
    drawn = torch.Generator().manual_seed(seed)
    return torch.nn.functional.logsigmoid(torch.randn(shapes[kind], generator=drawn, dtype=q.dtype) + 1)


def strengths(v, seed=2):
    """Beta `[B, H, T]` for `v`."""
    return torch.rand(v.shape[:3], generator=torch.Generator().manual_seed(seed), dtype=v.dtype)


def states(q, v, rows=None, seed=3):
    """An initial state."""
    shape = (q.shape[0] if rows is None else rows, v.shape[1], q.shape[3], v.shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=q.dtype)


def cut(x, start, stop):
    """Tokens `start` to `stop` of an input; what has no tokens stays."""
    return x if x is None or x.dim() == 1 else x[:, :, start:stop]


def close(got, wanted, tolerance=1e-10):
    """Two (out, state) agree."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)

"""Retention against flash-linear-attention and its own numbers."""

import math

import pytest
import torch

from recurrences import tokens
from regard.ops.states import retnet


def test_decays_by_hand():
    assert retnet.decays(3).exp().tolist() == pytest.approx([31 / 32, 63 / 64, 127 / 128])


def test_it_is_the_sum_of_the_paper():
    q, k, v = tokens(1, 2, 2, 12)
    out = torch.zeros_like(v)
    for h in range(2):
        for t in range(12):
            for j in range(t + 1):
                weight = (1 - 2 ** (-5 - h)) ** (t - j) * (q[0, h, t] @ k[0, h, j]) / math.sqrt(5)
                out[0, h, t] += weight * v[0, h, j]
    torch.testing.assert_close(retnet.scan(q, k, v)[0], out)
    torch.testing.assert_close(retnet.scan(q, k, v, scale=1.0)[0], out * math.sqrt(5))


@pytest.mark.parametrize("T", [64, 100])
def test_fla(T):
    naive = pytest.importorskip("fla.ops.retention.naive")
    q, k, v = tokens(Hk=4, T=T, dtype=torch.float32)
    torch.testing.assert_close(retnet.scan(q, k, v)[0], naive.naive_retention(q, k, v), atol=1e-4, rtol=1e-4)

"""Parts of mixers against the loops that state them."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.layers.blocks.conv import ShortConv
from regard.layers.blocks.gates import decay_bias
from regard.layers.blocks.heads import size, whole_groups
from regard.layers.blocks.norms import RMSNorm, l2, norm
from regard.layers.blocks.positions import positions
from regard.primitives.memory import Memory


def convolved(row, weight):
    """silu(sum_i w_i x_{t - K + 1 + i}), one token and one tap after the other."""
    taps, out = weight.shape[-1], torch.zeros_like(row)
    for t in range(len(row)):
        for tap in range(taps):
            source = t - taps + 1 + tap
            if source >= 0:
                out[t] += weight[:, 0, tap] * row[source]
    return torch.nn.functional.silu(out)


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(9, 9), (2, 7), (0, 9)])
def test_convolution_of_real_tokens(kernel, lengths):
    """Padding anywhere: what is left is one row of real tokens, in chunks, with a memory."""
    torch.manual_seed(0)
    conv, x = ShortConv(3, kernel, "tail").double(), torch.randn(2, 9, 3, dtype=torch.float64)
    mask = torch.stack([torch.randperm(9) < n for n in lengths])
    memory = Memory()
    with torch.no_grad():
        out = torch.cat([conv(x[:, a:b], memory=memory, mask=mask[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 9))], 1)
        for row in range(2):
            alone = convolved(x[row][mask[row]], conv.weight)
            torch.testing.assert_close(out[row][mask[row]], alone, atol=1e-12, rtol=0)
    assert (out[~mask] == 0).all()


def test_packed_convolution():
    conv, x = ShortConv(3, 4, "tail").double(), torch.randn(1, 9, 3, dtype=torch.float64)
    with torch.no_grad():
        out = conv(x, cu_seqlens=torch.tensor([0, 1, 3, 9]))
        for a, b in ((0, 1), (1, 3), (3, 9)):
            torch.testing.assert_close(out[0, a:b], convolved(x[0, a:b], conv.weight), atol=1e-12, rtol=0)


def test_positions_count_real_tokens():
    memory, mask = Memory(), torch.tensor([[False, True, True], [True, True, False]])
    assert positions(3, mask.device, memory, mask).tolist() == [[-1, 0, 1], [0, 1, 1]]
    memory.advance(3)
    assert positions(2, mask.device, memory, None).tolist() == [[2, 3], [2, 3]]
    assert memory.nbytes == 16


def test_norms():
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(norm("srms", 6, 1e-6)(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    gated, g = RMSNorm(6, eps=1e-6, gate="sigmoid"), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(gated(x, g), norm("srms", 6, 1e-6)(x) * torch.sigmoid(g))
    torch.testing.assert_close(l2(x).norm(dim=-1), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert l2(torch.zeros(1, 6)).tolist() == [[0.0] * 6]
    with pytest.raises(RegardError, match=r"unknown norm 'rmsnorm'.*'rms'"):
        norm("rmsnorm", 6, 1e-6)


def test_starting_steps_are_log_uniform():
    torch.manual_seed(0)
    steps = torch.nn.functional.softplus(decay_bias(20000)).log10()
    assert steps.min() >= -3.001
    assert steps.max() <= -0.999
    assert steps.mean().item() == pytest.approx(-2, abs=0.02)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: size("keys", 30, 0.5, 4), r"keys: 0.5 x width 30 = 15 channels.*4 heads.*are 16"),
        (lambda: size("keys", 30, 1.0, 0), "heads must be 1 or more, got 0"),
        (lambda: whole_groups(5, 2), "multiple of the 2 key heads, got 5"),
        (lambda: ShortConv(3, 0, "tail"), "1 or more, got 0"),
    ],
)
def test_what_is_refused(call, match):
    with pytest.raises(RegardError, match=match):
        call()

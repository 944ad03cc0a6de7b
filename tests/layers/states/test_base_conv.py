"""BaseConv against its formula, token by token."""

import torch

from regard.layers.states.base_conv import Mixer


def test_a_token_sees_the_last_three():
    torch.manual_seed(0)
    mixer = Mixer(4, 1).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    taps = mixer.conv.weight[:, 0]
    for t in range(9):
        summed = sum(taps[:, 2 - back] * x[:, t - back] for back in range(3) if t >= back)
        expected = summed * (x[:, t] @ mixer.gate.weight.T + mixer.gate.bias) + x[:, t]
        torch.testing.assert_close(mixer(x)[:, t], expected)

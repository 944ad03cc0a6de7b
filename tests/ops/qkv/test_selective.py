"""Selective Attention [068]: the oracles of its sheet."""

import math

import pytest
import torch

import regard
from regard.core.placement import Where
from regard.core.step import Step
from regard.ops.qkv import selective

WHERE = Where(0, 2, 4, 2, 8, (0, 1))


def step(start: int, width: int, padding=None) -> Step:
    return Step(start, width, 2, torch.device("cpu"), padding)


def made(where: Where = WHERE, **options):
    unset = {"beta": None, "betas": None, "form": "exp", "query_map": None, "value_map": None}
    return selective.prepare(where, **unset | options)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("form", ["exp", "linear"])
def test_folding_equals_the_eager_form(form):
    q, k, v = drawn(2, 4, 9, 8), drawn(2, 2, 9, 8), drawn(2, 2, 9, 8)
    maps = {"query_map": drawn(2, 8) / 3, "value_map": drawn(2, 8) / 3}
    # A beta for each layer replaces the one for all.
    edit = made(beta=-9.0, betas=torch.tensor([0.2, 7.0]), form=form, **maps)
    out, _ = regard.attend(edit.query(q, step(0, 9)), k, edit.value(v, step(0, 9)))
    rate = math.exp(-math.exp(0.2)) if form == "exp" else 0.2
    for b in range(2):
        for h in range(4):
            for i in range(9):
                tau = 1 + rate * math.log(i + 1) + math.tanh(float(q[b, h, i] @ maps["query_map"][0]))
                scores = torch.stack([tau * (q[b, h, i] @ k[b, h // 2, j]) / 8**0.5 for j in range(i + 1)])
                scale = 1 + torch.tanh(v[b, h // 2, : i + 1] @ maps["value_map"][0])
                wanted = (scores.softmax(0) * scale) @ v[b, h // 2, : i + 1]
                torch.testing.assert_close(out[b, h, i], wanted, atol=1e-6, rtol=1e-6)


def test_the_first_token_is_never_scaled_by_position_whatever_its_padding():
    edit = made(beta=-5.0)
    q = drawn(2, 4, 5, 8)
    scaled = edit.query(q, step(0, 5, torch.tensor([2, 0])))
    assert torch.equal(scaled[0, :, :3], q[0, :, :3])
    assert torch.equal(scaled[1, :, 0], q[1, :, 0])
    torch.testing.assert_close(scaled[0, :, 4], scaled[1, :, 2] / q[1, :, 2] * q[0, :, 4])


def test_a_larger_temperature_never_raises_the_entropy_of_a_row():
    q, k = drawn(2, 4, 9, 8), drawn(2, 4, 9, 8)
    flat, sharp = (((q * scale) @ k.mT).log_softmax(-1) for scale in (1.0, 1.7))
    assert ((-(sharp.exp() * sharp).sum(-1)) <= -(flat.exp() * flat).sum(-1) + 1e-12).all()


def test_only_placed_heads_change_and_nothing_set_is_neutral():
    edit = made(Where(0, 2, 4, 2, 8, (1,)), beta=0.0, form="linear", value_map=drawn(2, 8))
    assert made() is None
    q, v = drawn(2, 4, 5, 8), drawn(2, 2, 5, 8)
    scaled = made(Where(0, 2, 4, 2, 8, (1,)), beta=0.5, form="linear")
    now = scaled.query(q, step(0, 5))
    assert torch.equal(now[:, :2], q[:, :2])
    assert not torch.equal(now[:, 2:], q[:, 2:])
    assert torch.equal(edit.value(v, step(0, 5))[:, 0], v[:, 0])


def test_tensors_of_another_shape_are_named():
    with pytest.raises(regard.RegardError, match=r"query_map \[3, 8\], this model needs .* \[2, 8\]"):
        made(query_map=drawn(3, 8))
    with pytest.raises(regard.RegardError, match=r"betas \[3\], this model needs \[layers\] = \[2\]"):
        made(betas=drawn(3))

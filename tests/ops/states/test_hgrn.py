"""HGRN against flash-linear-attention, and packed and padded texts against those alone."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from regard.core.errors import RegardError
from regard.ops.states import hgrn


def made(B=2, T=23, D=5, dtype=torch.float64):
    drawn = torch.Generator().manual_seed(0)
    x, raw = (torch.randn(B, T, D, generator=drawn, dtype=dtype) for _ in range(2))
    return x, hgrn.gate(raw)


def test_it_is_the_definition():
    x, decay = made()
    h = start = torch.randn(2, 5, dtype=torch.float64)
    for backend in ("auto", "chunked", "stepwise"):
        out, last = hgrn.scan(x, decay, initial_state=start, backend=backend)
        h = start
        for t in range(23):
            forget = decay[:, t].exp()
            h = forget * h + (1 - forget) * x[:, t]
            torch.testing.assert_close(out[:, t], h)
        torch.testing.assert_close(last, h)


def test_fla():
    naive = pytest.importorskip("fla.ops.hgrn.naive")
    x, decay = made(dtype=torch.float32)
    start = torch.randn(2, 5)
    call = {"initial_state": start, "output_final_state": True}
    wanted = naive.naive_recurrent_hgrn(x * (1 - decay.exp()), decay, **call)
    for got, other in zip(hgrn.scan(x, decay, initial_state=start), wanted, strict=True):
        torch.testing.assert_close(got, other, atol=1e-5, rtol=1e-5)


def test_packed_sequences_are_separate():
    x, decay = made(B=1)
    start, cuts = torch.randn(3, 5, dtype=torch.float64), [0, 1, 9, 23]
    for state in (None, start):
        out, last = hgrn.scan(x, decay, initial_state=state, cu_seqlens=torch.tensor(cuts))
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            own = None if state is None else state[i : i + 1]
            wanted, end = hgrn.scan(x[:, a:b], decay[:, a:b], initial_state=own)
            torch.testing.assert_close(out[:, a:b], wanted)
            torch.testing.assert_close(last[i : i + 1], end)


def test_padding_on_either_side():
    x, decay = made()
    mask = torch.zeros(2, 23, dtype=torch.bool)
    mask[0, 4:], mask[1, :11] = True, True
    dirty = [y.masked_fill(~mask[..., None], torch.nan) for y in (x, decay)]
    out, last = hgrn.scan(*dirty, mask=mask)
    assert not out[~mask].any()
    for row, (a, b) in enumerate([(4, 23), (0, 11)]):
        wanted, end = hgrn.scan(x[row : row + 1, a:b], decay[row : row + 1, a:b])
        torch.testing.assert_close(out[row : row + 1, a:b], wanted)
        torch.testing.assert_close(last[row : row + 1], end)


def test_gradients_and_extreme_gates():
    x, decay = made(1, 6, 2)
    start = torch.randn(1, 2, dtype=torch.float64)
    given = [y.requires_grad_() for y in (x, decay, start)]
    assert gradcheck(lambda x, decay, start: hgrn.scan(x, decay, initial_state=start), given)
    cuts = torch.tensor([0, 2, 6])
    starts = torch.randn(2, 2, dtype=torch.float64).requires_grad_()
    packed = [*given[:2], starts]
    assert gradcheck(lambda x, decay, s: hgrn.scan(x, decay, initial_state=s, cu_seqlens=cuts), packed)
    gates = torch.tensor([0.0, -torch.inf, -1e4, 0.0, -torch.inf, -1.0]).double()[None, :, None].expand(1, 6, 2)
    gates = gates.clone().requires_grad_()
    out, last = hgrn.scan(x, gates, initial_state=start)
    torch.testing.assert_close(out[:, 1], x[:, 1])
    (out.sum() + last.sum()).backward()
    assert bool(gates.grad.isfinite().all())


def test_no_tokens():
    x, decay = made(T=0)
    start = torch.randn(2, 5, dtype=torch.float64)
    out, last = hgrn.scan(x, decay, initial_state=start)
    assert out.shape == (2, 0, 5)
    assert torch.equal(last, start)


def test_bounds_rise_from_nothing():
    bounds = hgrn.lower_bounds(torch.zeros(4, 3, dtype=torch.float64))
    torch.testing.assert_close(bounds[:, 0], torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64))
    gate = hgrn.gate(torch.tensor([-50.0, 0.0], dtype=torch.float64), bounds[2, :2])
    torch.testing.assert_close(gate.exp(), torch.tensor([0.5, 0.75], dtype=torch.float64))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"decay": torch.full((2, 23, 5), 0.5)}, "at most 0"),
        ({"decay": torch.zeros(2, 22, 5)}, r"float \[B, T, D\], got \[2, 23, 5\].*\[2, 22, 5\]"),
        ({"initial_state": torch.zeros(2, 4)}, r"must be \[2, 5\]"),
        ({"initial_state": torch.zeros(2, 5).half()}, "float32, got .*float16"),
        ({"mask": torch.ones(2, 23)}, "mask must be bool"),
        ({"cu_seqlens": torch.tensor([0, 23])}, "B must be 1"),
        ({"backend": "chunkd"}, "Did you mean 'chunked'"),
        ({"backend": "triton"}, "'triton' refuses: kernels run on a CUDA device, not on cpu"),
    ],
)
def test_refuses(written, words):
    x, decay = made(dtype=torch.float32)
    with pytest.raises(RegardError, match=words):
        hgrn.scan(**{"x": x, "decay": decay, **written})


@pytest.mark.parametrize("cuts", [[0, 5, 5, 23], [0, 22], [1, 23]])
def test_refuses_cuts(cuts):
    x, decay = made(B=1)
    with pytest.raises(RegardError, match="cu_seqlens must"):
        hgrn.scan(x, decay, cu_seqlens=torch.tensor(cuts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_kernel_is_taken_and_agrees():
    x, decay = (y.cuda() for y in made(T=300, D=96, dtype=torch.float32))
    got = hgrn.scan(x, decay)
    for one, named in zip(got, hgrn.scan(x, decay, backend="triton"), strict=True):
        assert torch.equal(one, named)
    for one, other in zip(got, hgrn.scan(x, decay, backend="chunked"), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

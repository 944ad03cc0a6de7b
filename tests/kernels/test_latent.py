"""Absorbed decoding over latents by its kernels, against float64: interpreted, or compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cases import latent as case
from regard.kernels.attention import latent as kernel
from regard.ops import latent as ops
from running import DEVICE, FLOATS, close, drawn, filled_with_nan

HALF = torch.float16
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
# Rank and rotary size; the last is taken by the kernel whose warps do one thing each, which needs the GPU.
SIZES = [(32, 16), (48, 32), (16, 16), pytest.param((512, 64), marks=pytest.mark.skipif(not HOPPER, reason="Hopper"))]


def definition(q, latent, rank, scale, lengths, starts):
    """One request, head and query at a time, in float64."""
    B, H, T, _ = q.shape
    out = torch.zeros(B, H, T, rank, dtype=torch.float64)
    lse = torch.full((B, H, T), -torch.inf, dtype=torch.float64)
    for b in range(B):
        held = latent[b].double()
        for t in range(T):
            keys = slice(starts[b], lengths[b] - T + 1 + t)
            if keys.start < keys.stop:
                scores = scale * q[b, :, t].double() @ held[keys].T
                out[b, :, t] = scores.softmax(-1) @ held[keys, :rank]
                lse[b, :, t] = scores.logsumexp(-1)
    return out, lse


def check(B, H, T, S, rank, rope, *, lengths=None, starts=None, dtype=HALF, change=lambda x: x):
    make = drawn(S)
    q, latent = make(B, H, T, rank + rope).to(dtype), make(B, S, rank + rope).to(dtype)
    scale = 1.5 / (rank + rope) ** 0.5
    told = (lengths or [S] * B, starts or [0] * B)
    expected = definition(q, latent, rank, scale, *told)
    for b, length in enumerate(told[0]):
        latent[b, length:] = torch.nan  # never written
    given = [None if x is None else torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (lengths, starts)]
    with filled_with_nan():
        out, lse = kernel.decode(
            q.to(DEVICE), change(latent.to(DEVICE)), rank=rank, scale=scale, lengths=given[0], starts=given[1]
        )
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # Weights are rounded too, and the interpreter cuts them off.
    close(out, expected[0], 3 * FLOATS[dtype])
    some = expected[1] > -torch.inf
    assert ((lse.cpu() > -torch.inf) == some).all()
    if some.any():
        close(lse.cpu()[some], expected[1][some], 1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("H", "T", "S"), [(4, 1, 200), (2, 1, 64), (3, 1, 1), (4, 3, 130)])
def test_sizes(size, H, T, S):
    check(2, H, T, S, *size)


@pytest.mark.parametrize("size", SIZES[:1] + SIZES[3:])
def test_requests_of_different_lengths(size):
    """Short and long, padded on the left, and padded beyond the first tile; what was never written is NaN."""
    check(4, 3, 1, 300, *size, lengths=[300, 1, 64, 129], starts=[0, 0, 3, 128])
    check(3, 2, 2, 140, *size, lengths=[140, 70, 2], starts=[139, 65, 0])


@pytest.mark.parametrize("size", SIZES[:1] + SIZES[3:])
def test_rows_that_see_nothing(size):
    check(2, 3, 2, 80, *size, lengths=[80, 1], starts=[79, 0])
    check(1, 3, 1, 64, *size, starts=[64])


@pytest.mark.parametrize("size", SIZES[:1] + SIZES[3:])
def test_more_rows_than_a_program_holds(size):
    check(1, 35, 2, 70, *size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES[:1] + SIZES[3:])
def test_dtypes(size, dtype):
    check(1, 4, 1, 100, *size, dtype=dtype)


@pytest.mark.parametrize("size", SIZES[:1] + SIZES[3:])
def test_part_of_a_growing_buffer(size):
    """What a store shows: rows further apart than the tokens in them."""

    def within(latent):
        spare = torch.full_like(latent[:, :7], torch.nan)
        return torch.cat((latent, spare), 1)[:, : latent.shape[1]]

    check(2, 4, 1, 90, *size, change=within)
    check(2, 4, 1, 90, *size, lengths=[20, 88], change=within)


def test_shares():
    """The last wave of programs is as short as the tiles allow; every share has a tile."""
    assert kernel.shares(128, 128) == 1
    assert kernel.shares(2, 512) == 64
    for programs in (1, 2, 8, 31, 64, 100, 132, 133, 500):
        for tiles in (1, 2, 7, 128, 2048):
            count = kernel.shares(programs, tiles)
            assert 1 <= count <= tiles
            waves = -(-programs * count // kernel.PROGRAMS)
            assert waves * -(-tiles // count) <= -(-programs // kernel.PROGRAMS) * tiles


def test_refuses_by_name(monkeypatch):
    q, latent = torch.zeros(1, 2, 1, 48, dtype=HALF), torch.zeros(1, 9, 48, dtype=HALF)
    assert "cpu" in kernel.refuses(q, latent, rank=32)
    monkeypatch.setattr(kernel.device, "refuses", lambda tensor: None)
    assert "compute capability 9.0" in kernel.refuses(q, latent, rank=32)
    monkeypatch.setattr(kernel.device, "capability", lambda tensor: (9, 0))
    assert kernel.refuses(q, latent, rank=32) is None
    assert "not torch.float32 over torch.float32" in kernel.refuses(q.float(), latent.float(), rank=32)
    assert "not torch.float16 over torch.bfloat16" in kernel.refuses(q, latent.bfloat16(), rank=32)
    assert "not 40 + 8" in kernel.refuses(q, latent, rank=40)
    assert "not 48 + 0" in kernel.refuses(q, latent, rank=48)
    wide = torch.zeros(1, 9, 49, dtype=HALF)[..., :48]
    assert "whole rows of 16 bytes" in kernel.refuses(q, wide, rank=32)
    assert "whole rows of 16 bytes" in kernel.refuses(q, latent.mT.contiguous().mT, rank=32)


@pytest.mark.parametrize("size", [(32, 16), (512, 64)])
def test_the_op_asks_for_what_the_kernel_reads(size, monkeypatch):
    """Queries are longer or shorter than latents until they are absorbed."""
    monkeypatch.setattr(kernel.device, "refuses", lambda tensor: None)
    monkeypatch.setattr(kernel.device, "capability", lambda tensor: (9, 0))
    rank, rope = size
    q, latent = torch.zeros(1, 2, 1, 24 + rope, dtype=HALF), torch.zeros(1, 99, rank + rope, dtype=HALF)
    up = torch.zeros(2, rank, 24, dtype=HALF), torch.zeros(2, rank, 40, dtype=HALF)
    assert ops.choose(q, latent, *up, backend="triton")[:2] == ("absorbed", "triton")


@pytest.mark.skipif(DEVICE != "cuda", reason="ops run kernels on a GPU only")
@pytest.mark.parametrize("size", SIZES[:1] + SIZES[3:])
def test_the_op_runs_it(size):
    rank, rope = size
    make = drawn(3)
    q, latent = make(2, 4, 1, 24 + rope).to(DEVICE), make(2, 99, rank + rope).to(DEVICE)
    up = make(4, rank, 24).to(DEVICE) / rank**0.5, make(4, rank, 40).to(DEVICE) / rank**0.5
    padding = torch.tensor([0, 30], device=DEVICE)
    expected = ops.attend(q, latent, *up, padding=padding, form="expanded", backend="reference")
    half = [x.to(torch.bfloat16) for x in (q, latent, *up)]
    assert kernel.refuses(*half[:2], rank=rank) is None
    assert ops.choose(*half, padding=padding)[:2] == ("absorbed", "triton")
    close(ops.attend(*half, padding=padding)[0], expected[0], 0.03)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("size", SIZES[:1] + SIZES[3:])
def test_replayed_from_a_graph(size):
    make = drawn(2)
    q, latent = (make(*shape, sum(size)).to(DEVICE, HALF) for shape in ((2, 4, 1), (2, 200)))
    lengths = torch.tensor([200, 150], dtype=torch.int32, device=DEVICE)
    call = {"rank": size[0], "scale": 0.1, "lengths": lengths}
    kernel.decode(q, latent, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = kernel.decode(q, latent, **call)
    for change in (lambda: None, lambda: lengths.sub_(70), lambda: q.neg_()):
        change()
        graph.replay()
        expected = kernel.decode(q, latent, **call)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


def test_the_benchmark_runs():
    told, rows = case.run(batch=2, tokens=70, heads=2, rank=32, rope=16, steps=1, repeats=1)
    assert [row["rows"] for row in rows] == [2]
    assert rows[0]["error"] <= case.MOST
    assert rows[0]["share of floor"] > 0
    assert rows[0]["operations"] == 2 * 2 * 2 * 70 * (32 + 16 + 32)
    assert told["product TFLOP/s"] > 0

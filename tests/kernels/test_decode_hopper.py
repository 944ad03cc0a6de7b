"""Decoding in one launch against the definition in float64, on a Hopper GPU; what it takes, anywhere."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from regard.kernels import device
from regard.kernels.attention import decode as kernel
from regard.ops.decode import decode
from running import DEVICE, FLOATS, close, drawn, filled_with_nan, right

if triton.__version__.startswith("3.6."):
    from regard.kernels.attention import decode_hopper as hopper
else:
    pytest.skip("the kernel is written for Triton 3.6", allow_module_level=True)

ON_HOPPER = pytest.mark.skipif(
    device.capability(torch.device(DEVICE))[0] != 9, reason="the kernel runs on a Hopper GPU only"
)


def made(seed, B, H, Hk, T, S, dtype=torch.bfloat16):
    make = drawn(seed)
    return make(B, H, T, 128).to(dtype), make(B, Hk, S, 128).to(dtype), make(B, Hk, S, 128).to(dtype)


def launches(monkeypatch):
    """A list that grows by one with each launch of the kernel for Hopper."""
    seen, launch = [], hopper.decode
    monkeypatch.setattr(hopper, "decode", lambda *arguments: (seen.append(1), launch(*arguments)))
    return seen


def check(q, k, v, causal=True):
    """The kernel and the definition on the same numbers, twice: the second call finds what the first has left."""
    expected = decode(q.double(), k.double(), v.double(), check=False, causal=causal)
    here = [x.to(DEVICE) for x in (q, k, v)]
    for _ in range(2):
        with filled_with_nan():
            right(kernel.decode(*here, scale=128**-0.5, causal=causal), expected, q.dtype)


def at_rest():
    """Whether all workspaces are as a call wants to find them."""
    torch.cuda.synchronize()
    return all((space == -1).all() for space in hopper._made.values())


def test_what_it_takes():
    q, k, v = made(0, 1, 32, 8, 1, 70)
    assert hopper.takes(q, k, v)
    assert hopper.takes(q.expand(-1, -1, 4, -1), k, v)
    assert hopper.takes(q, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)))
    assert hopper.takes(q, k[:, :, 7:], v[:, :, 7:])
    assert not hopper.takes(q.expand(-1, -1, 5, -1), k, v)
    assert not hopper.takes(q.expand(3, -1, -1, -1), *(x.repeat(3, 1, 1, 1) for x in (k, v)))
    assert not hopper.takes(*(x.float() for x in (q, k, v)))
    assert not hopper.takes(*(x[..., :64] for x in (q, k, v)))
    assert not hopper.takes(q, k[:, :, :0], v[:, :, :0])
    assert hopper.takes(q[:, :4], *(torch.empty(1, 1, 4096, 128, dtype=q.dtype) for _ in range(2)))
    assert not hopper.takes(q[:, :4], *(torch.empty(1, 1, 4097, 128, dtype=q.dtype) for _ in range(2)))
    assert not hopper.takes(q, k.flatten()[3 : 3 + 8 * 69 * 128].view(1, 8, 69, 128), v[:, :, 1:])
    assert not hopper.takes(*(x.expand(2, -1, -1, -1) for x in (q, k, v)))


def test_pieces_and_tickets_have_room():
    space = hopper.workspace(torch.device("cpu"))
    readers = hopper.cores(torch.device("cpu"))
    assert space is not None
    assert (space == -1).all()
    assert len(space) == hopper.MOST * 32 + readers * hopper.ROWS * (128 + 2)


@ON_HOPPER
@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 128, 129, 1000, 8191, 32769])
def test_lengths(S, monkeypatch):
    seen = launches(monkeypatch)
    check(*made(1, 1, 32, 8, 1, S))
    assert len(seen) == 2
    assert at_rest()


@ON_HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "H", "Hk"), [(1, 1, 1), (1, 2, 2), (3, 5, 1), (1, 14, 2), (1, 7, 7), (4, 12, 3), (2, 64, 8)]
)
def test_heads_and_requests(B, H, Hk, dtype):
    check(*made(2, B, H, Hk, 1, 3000, dtype))
    check(*made(2, B, H, Hk, 1, 70, dtype))


@ON_HOPPER
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "Hk", "T"), [(4, 4, 16), (8, 2, 4), (8, 1, 2), (5, 1, 3), (32, 16, 8)])
def test_new_tokens(H, Hk, T, causal, monkeypatch):
    """The first tokens see less; of the last tile, where it holds one key, and of the only one, some see none."""
    seen = launches(monkeypatch)
    for S in (1, 3, 16, 64, 65, 129, 700, 2049):
        check(*made(3, 1, H, Hk, T, S), causal=causal)
    assert len(seen) == 16


@ON_HOPPER
def test_strides():
    """Tokens before heads, queries that are a slice, slots that are not used."""
    q, k, v = (x.to(DEVICE) for x in made(4, 2, 8, 2, 2, 900))
    expected = decode(*(x.double() for x in (q.cpu(), k.cpu()[:, :, :800], v.cpu()[:, :, :800])))
    long = torch.cat([k, v], 3).transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([q, q], 3)[..., :128]
    right(kernel.decode(wide, long[:, :, :800, :128], long[:, :, :800, 128:], scale=128**-0.5), expected)


@ON_HOPPER
def test_calls_it_does_not_do_are_done_by_the_other(monkeypatch):
    seen = launches(monkeypatch)
    check(*made(5, 3, 8, 8, 1, 100))
    here = [x.to(DEVICE) for x in made(5, 1, 4, 2, 1, 300)]
    twice = [x.expand(2, -1, -1, -1) for x in here]
    right(kernel.decode(*twice, scale=128**-0.5), decode(*(x.double().cpu() for x in twice)))
    assert not seen
    kernel.decode(*here, scale=0.1, lengths=torch.tensor([100], device=DEVICE))
    kernel.decode(*here, scale=0.1, softcap=5.0)
    kernel.decode(*here, scale=0.1, recent=50)
    kernel.decode(*here, scale=0.1, workers=3)
    assert not seen


@ON_HOPPER
def test_numbers_that_are_none():
    """Ones in all bits are a NaN in every format, and must not be taken for a piece that has not come."""
    q, k, v = (x.to(DEVICE) for x in made(6, 1, 8, 2, 1, 4000))
    k[0, 0, 3000:].view(torch.int16).fill_(-1)
    v[0, 1, 17].view(torch.int16).fill_(-1)
    out, lse = kernel.decode(q, k, v, scale=0.1)
    assert out.isnan().all()
    assert lse[0, :4].isnan().all()
    assert at_rest()
    check(*made(6, 1, 8, 2, 1, 4000))


@ON_HOPPER
def test_large_scores():
    q, k, v = made(7, 1, 8, 2, 1, 3000)
    check(q * 300, k, v)


@ON_HOPPER
def test_many_calls_follow_each_other():
    """Of other shapes, with the same memory."""
    cases = []
    for shape in [(1, 32, 8, 1, 32768), (1, 32, 8, 1, 500), (2, 8, 2, 4, 2000), (1, 4, 1, 1, 4000)]:
        inputs = made(8, *shape)
        here = [x.to(DEVICE) for x in inputs]
        cases.append((here, [x.to(DEVICE) for x in decode(*(x.double() for x in here))]))
    for _ in range(50):
        found = []
        with filled_with_nan():
            for _ in range(2):
                found += [kernel.decode(*here, scale=128**-0.5) for here, _ in cases]
        for (out, lse), (_, (expected, masses)) in zip(found, cases * 2, strict=True):
            error = ((out - expected).abs().max() / expected.abs().max()).item()
            assert error <= 1e-2  # of outputs near 0: weights are rounded too
            assert (lse - masses).abs().max() <= 1e-4
    assert at_rest()


def captured(calls):
    """A graph of these calls, and what they fill."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [kernel.decode(*inputs, scale=128**-0.5) for inputs in calls]
    return graph, found


@ON_HOPPER
def test_graphs_and_streams_at_once(monkeypatch):
    """Two graphs and two streams, all under way together, have memory of their own."""
    inputs = [[x.to(DEVICE) for x in made(20 + i, 1, 32, 8, 1, S)] for i, S in enumerate([9000, 3000, 20000])]
    expected = [decode(*(x.double() for x in each)) for each in inputs]
    kernel.decode(*inputs[0], scale=128**-0.5)
    seen = launches(monkeypatch)
    graphs = [captured(inputs), captured(inputs[::-1])]
    assert len(seen) == 6
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(30):
        launched = []
        for out, lse in graphs[0][1] + graphs[1][1]:
            out.fill_(torch.nan)
            lse.fill_(torch.nan)
        torch.cuda.synchronize()
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < 2:
                    graphs[i][0].replay()
                else:
                    launched.append([kernel.decode(*each, scale=128**-0.5) for each in inputs])
        torch.cuda.synchronize()
        for found in [graphs[0][1], graphs[1][1][::-1], *launched]:
            for (out, lse), (wanted, masses) in zip(found, expected, strict=True):
                close(out, wanted, FLOATS[torch.bfloat16])
                close(lse, masses, 1e-5)
    assert at_rest()


@ON_HOPPER
def test_more_graphs_than_memory_was_made_for(monkeypatch):
    """Those that get none run the other kernel; a call outside makes more."""
    inputs = [x.to(DEVICE) for x in made(30, 1, 8, 2, 1, 700)]
    expected = decode(*(x.double() for x in inputs))
    kernel.decode(*inputs, scale=128**-0.5)
    with monkeypatch.context() as context:  # compiles the other kernel
        context.setattr(kernel, "_at_once", lambda *arguments: None)
        kernel.decode(*inputs, scale=128**-0.5)
    seen = launches(monkeypatch)
    graphs = [captured([inputs]) for _ in range(hopper.SPARE + 1)]
    assert len(seen) == hopper.SPARE
    kernel.decode(*inputs, scale=128**-0.5)
    graphs.append(captured([inputs, inputs]))
    assert len(seen) == hopper.SPARE + 3
    for graph, found in graphs:
        graph.replay()
        for out, lse in found:
            close(out, expected[0], FLOATS[torch.bfloat16])
            close(lse, expected[1], 1e-5)
    assert at_rest()

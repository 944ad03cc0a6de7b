"""The decoding kernel against the definition in float64: interpreted, or compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cases import decode as decoding
from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.core.store import Part
from regard.kernels.attention import decode as kernel
from regard.kernels.attention import intervals
from regard.ops.attention import attend, choose
from regard.ops.decode import decode
from regard.primitives.full import Full
from regard.primitives.head_split import HeadSplit
from regard.primitives.ring import Ring
from running import DEVICE, FLOATS, close, drawn, filled_with_nan, right


def check(q, k, v, *, dtype=torch.float32, workers=None, **options):
    """The kernel and the definition on the same rounded inputs; where `pages` says so, on pools of pages."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    expected = decode(q.double(), k.double(), v.double(), check=False, **options)
    here = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()}
    scale = here.pop("scale", q.shape[3] ** -0.5)
    with filled_with_nan():
        found = kernel.decode(*(x.to(DEVICE) for x in (q, k, v)), scale=scale, workers=workers, **here)
    right(found, expected, dtype)
    return found


def made(seed, B, H, Hk, T, S, D, Dv=None):
    make = drawn(seed)
    return make(B, H, T, D), make(B, Hk, S, D), make(B, Hk, S, Dv or D)


def scattered(x, size, seed=0):
    """`x [B, Hk, S, D]` in a pool of pages of `size` keys, in random places, and the page table."""
    B, Hk, S, D = x.shape
    n = S // size
    table = torch.randperm(B * n + 3, generator=torch.Generator().manual_seed(seed))[: B * n].view(B, n)
    pool = torch.full((B * n + 3, Hk, size, D), torch.nan, dtype=x.dtype)
    pool[table] = x.unflatten(2, (n, size)).transpose(1, 2)
    return pool, table


@pytest.mark.parametrize("workers", [1, 2, 5, 20])
def test_any_number_of_workers(workers):
    """One walks all outputs in order; 20 are more than there are tiles."""
    check(*made(0, 2, 2, 1, 1, 300, 64), workers=workers, lengths=torch.tensor([300, 70]))


def test_no_more_workers_than_it_takes():
    """Without lengths 8 heads of 512 tiles are read by 256 programs of 264, 16 tiles each."""
    assert kernel._workers(8 * 512, 264, True) == 256
    assert kernel._workers(8 * 512, 264, False) == 264
    assert kernel._workers(3, 264, True) == 3
    check(*made(11, 1, 3, 3, 1, 400, 16))


@pytest.mark.parametrize(("H", "Hk", "T"), [(2, 2, 1), (4, 1, 3), (3, 1, 7), (16, 1, 4)])
def test_groups_and_new_tokens(H, Hk, T):
    """Query rows from 1 to 64 a KV head; the last ones see more than the first."""
    check(*made(1, 1, H, Hk, T, 200, 16), workers=2)
    check(*made(1, 1, H, Hk, T, 200, 16), workers=1, lengths=torch.tensor([T - 1]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (128, 128), (256, 256), (80, 48), (16, 128)])
def test_sizes_and_dtypes(dtype, D, Dv):
    check(*made(2, 1, 4, 2, 1, 130, D, Dv), dtype=dtype, workers=3)


def test_ragged_requests_and_empty_ones():
    lengths = torch.tensor([0, 1, 129, 64, 0, 200], dtype=torch.int32)
    check(*made(3, 6, 2, 2, 1, 200, 16), workers=7, lengths=lengths)
    check(*made(3, 6, 2, 2, 1, 200, 16), workers=7, lengths=torch.zeros(6, dtype=torch.int32))


def test_more_requests_than_are_looked_at_in_one_go(monkeypatch):
    requests = 133
    if DEVICE == "cpu":
        # Interpreted requests take their time, so fewer are looked at.
        monkeypatch.setattr(intervals, "BATCH", type(intervals.BATCH)(4))
        requests = 6
    for workers in (1, 3):
        lengths = torch.arange(requests) % 6
        check(*made(4, requests, 1, 1, 1, 5, 16), workers=workers, lengths=lengths)


@pytest.mark.parametrize("size", [16, 48])
def test_pages(size):
    q, k, v = made(5, 3, 4, 2, 2, 192, 32)
    lengths = torch.tensor([192, 17, 100])
    (k_pool, table), (v_pool, _) = scattered(k, size), scattered(v, size)
    dead = torch.arange(192 // size) * size >= lengths[:, None]
    table[dead] = -1
    paged = check(q, k_pool, v_pool, workers=5, lengths=lengths, pages=table.masked_fill(dead, 10**6))
    for x, y in zip(paged, check(q, k, v, workers=5, lengths=lengths), strict=True):
        assert torch.equal(x, y)


def test_what_lies_behind_a_request_is_not_read():
    q, k, v = made(6, 2, 2, 1, 1, 70, 16)
    lengths = torch.tensor([70, 33])
    k[1, :, 33:], v[1, :, 33:] = torch.nan, torch.inf
    check(q, k, v, lengths=lengths)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(("sink", "recent"), [(0, None), (0, 20), (3, 20)])
def test_positions_with_holes(sink, recent, by_head):
    torch.manual_seed(7)
    q, k, v = made(7, 2, 4, 2, 3, 90, 16)
    at = torch.randint(-2, 90, (2, 2, 90) if by_head else (1, 90))
    asked = torch.tensor([[50, 89, -1]])
    check(q, k, v, workers=3, positions=at, q_positions=asked, sink=sink, recent=recent)
    check(q, k, v, workers=3, positions=at, q_positions=asked, sink=sink, recent=recent, causal=False)


def test_windows_of_consecutive_keys_and_full_attention():
    q, k, v = made(8, 1, 2, 1, 3, 100, 16)
    check(q, k, v, workers=2, sink=2, recent=9)
    check(q, k, v, workers=2, causal=False, lengths=torch.tensor([2]))
    check(q, k, v, workers=2, q_positions=torch.tensor([[4, 99, 0]]))


def test_softcap_and_large_scores():
    q, k, v = made(9, 1, 4, 2, 1, 100, 16)
    check(q * 30, k, v, workers=3, softcap=5.0)
    check(q * 300, k, v, workers=3)


def test_strides():
    """Tokens before heads, slots that are not used, rows that are one."""
    q, k, v = made(10, 2, 4, 2, 2, 130, 32)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    check(*apart, workers=3)
    check(q[:1].expand(2, -1, -1, -1), k[:1, :, :100].expand(2, -1, -1, -1), v[:, :, 30:])


def test_launches_follow_each_other():
    """The count of finished pieces is left at zero, however many outputs the launch before had."""
    for B, workers in [(3, 5), (1, 2), (2, 9)]:
        check(*made(11, B, 2, 2, 1, 200, 16), workers=workers)


def test_refuses_by_name(monkeypatch):
    q, k, v = (x.bfloat16() for x in made(0, 1, 4, 2, 1, 8, 32))
    assert "cpu" in kernel.refuses(q, k, v)
    monkeypatch.setattr(kernel.device, "refuses", lambda tensor: None)
    assert kernel.refuses(q, k, v) is None
    assert "D of 16, 32, ..., 256, not 24" in kernel.refuses(q[..., :24], k[..., :24], v)
    assert "Dv of 16, 32, ..., 256, not 8" in kernel.refuses(q, k, v[..., :8])
    assert "torch.float32" in kernel.refuses(q, k, v.float())
    assert "up to 64 query rows" in kernel.refuses(q.expand(1, 4, 33, 32), k, v)
    assert "contiguous" in kernel.refuses(q, k.mT.contiguous().mT, v)
    assert "no gradients" in kernel.refuses(q.requires_grad_(), k, v)


ON_A_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="the kernel runs by itself on a GPU only")


@ON_A_GPU
def test_replayed_from_a_graph_while_lengths_grow():
    q, k, v = (x.to(DEVICE).half() for x in made(12, 3, 8, 2, 1, 3000, 64))
    lengths = torch.tensor([5, 0, 2000], device=DEVICE)
    kernel.decode(q, k, v, scale=0.1, lengths=lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel.decode(q, k, v, scale=0.1, lengths=lengths)
    for grown in ([6, 0, 2001], [700, 1, 3000], [3000, 3000, 3000]):
        lengths.copy_(torch.tensor(grown))
        graph.replay()
        for x, y in zip(found, kernel.decode(q, k, v, scale=0.1, lengths=lengths), strict=True):
            assert torch.equal(x, y)


@ON_A_GPU
@pytest.mark.parametrize(
    "pattern", [None, Pattern.window(700), Pattern.window(5000), Pattern.sink(4) | Pattern.window(600)]
)
@pytest.mark.parametrize("T", [1, 4])
def test_attend_decodes(pattern, T):
    q, k, v = (x.to(DEVICE).bfloat16() for x in made(13, 2, 8, 2, T, 1000, 64))
    # One query that sees all keys is left to torch.
    assert choose(q, k, v, pattern=pattern)[0] == (
        "sdpa" if T == 1 and pattern in (None, Pattern.window(5000)) else "decode"
    )
    expected = attend(q.double(), k.double(), v.double(), pattern=pattern, backend="reference")
    for x, y, most in zip(
        attend(q, k, v, pattern=pattern, backend="decode"), expected, (FLOATS[torch.bfloat16], 1e-5), strict=True
    ):
        close(x, y, most)


def test_some_heads_of_a_layer():
    """Groups of KV heads find their queries among all, and answer in their places of one output."""
    q, k, v = (x.float() for x in made(15, 2, 8, 4, 2, 200, 32))
    expected = decode(q.double(), k.double(), v.double())
    out, lse = (torch.full_like(x, torch.nan, dtype=torch.float32, device=DEVICE) for x in expected)
    for heads in ([3, 0], [1, 2]):
        part = Part(torch.tensor(heads, device=DEVICE), 2, out, lse)
        kernel.decode(
            *(x.to(DEVICE).float() for x in (q, k[:, heads], v[:, heads])), scale=32**-0.5, workers=3, part_of=part
        )
    for found, x in zip((out, lse), expected, strict=True):
        close(found, x, 1e-5)


@ON_A_GPU
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["full", "ring", "split"])
def test_stores_decode(kind, padded):
    heads = {"split": ([0, 2], [1, 3])}.get(kind)
    pattern = Pattern.causal() if kind == "full" else Pattern.sink(4) | Pattern.window(900)
    used = []

    def run(q, k, v, **options):
        aligned = options["k_positions"] is None
        used.append(choose(q, k, v, pattern=options["pattern"], aligned=aligned)[0])
        return attend(q, k, v, **options)

    store = Full(run) if kind == "full" else Ring(run, 4, 900)
    if heads:
        pattern = Pattern.stack_heads([pattern, Pattern.causal()] * 2)
        store = HeadSplit([(heads[0], store), (heads[1], Full(run))])
    padding = torch.tensor([3, 40], device=DEVICE) if padded else None
    q, k, v = (x.to(DEVICE).bfloat16() for x in made(14, 2, 8, 4, 1500, 1500, 64))
    start = 0
    for width in [1496, 1, 1, 2]:
        step = Step(start, width, 2, torch.device(DEVICE), padding)
        now = slice(start, start + width)
        view = store.append(k[:, :, now], v[:, :, now], step)
        used.clear()
        out, lse = view.attend(q[:, :, now], pattern=pattern, step=step, scale=0.1)
        start += width
    assert set(used) == {"decode"}
    at = step.positions(torch.arange(1500, device=DEVICE))
    expected = attend(*(x.double() for x in (q[:, :, now], k, v)), pattern=pattern, scale=0.1, backend="reference",
                      q_positions=at[:, now], k_positions=at)  # fmt: skip
    close(out, expected[0], FLOATS[torch.bfloat16])
    close(lse, expected[1], 1e-5)


def test_the_benchmark_runs():
    _, rows = decoding.run(heads=1, kv_heads=1, width=16, length=8, page=4, steps=1, repeats=1, flex=0, requests=2)
    assert {row["case"] for row in rows} == {"one", "even", "ragged", "ragged pages"}
    assert {row["side"] for row in rows} >= {"ours", "copy"}
    assert all(row["says"] or (row["us"] > 0 and row["error"] <= decoding.MOST) for row in rows)
    assert not any(row["says"] for row in rows if row["side"] == "ours")


def test_the_benchmark_leaves_out_peers_that_cannot_run():
    def broken(i):
        raise RuntimeError("No available kernel.\nAborting.")

    sides = {"ours": lambda i: i, "peer": broken}
    assert decoding.first(sides) == ({"ours": 0}, {"peer": "RuntimeError: No available kernel."})
    assert list(sides) == ["ours"]
    with pytest.raises(RuntimeError, match="No available"):
        decoding.first({"ours": broken})

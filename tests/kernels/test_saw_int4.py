"""Codes of 4 and 8 bits written and read where they lie: interpreted, or compiled on a GPU.

Codes must be those of `ops/cache/saw_int4.py`, to the bit; attention that of the decoded codes in float64.
"""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from cases import int4
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.core.step import Step
from regard.core.store import Part
from regard.kernels.cache import saw_int4 as kernel
from regard.ops import decode
from regard.ops.attention import attend
from regard.ops.cache import saw_int4 as paper
from regard.primitives import codes as stored
from regard.primitives.full import Full
from regard.primitives.head_split import HeadSplit
from regard.primitives.ring import Ring
from running import DEVICE, close, drawn, filled_with_nan

# Rounded to the nearest in the interpreter too, so as on a GPU.
MOST = 2**-7


def codecs(D, key=4, value=4, block=None, rotate_v=False):
    where = Where(layer=0, layers=1, heads=4, kv_heads=2, head_dim=D)
    return paper.encode(where, key_bits=key, value_bits=value, block=block, rotate_v=rotate_v)


def forms(pair):
    return {name: None if codec is None else codec.form for name, codec in zip(("key", "value"), pair, strict=True)}


def encoded(codec, x):
    """By the definition, on a CPU."""
    return tuple(f.to(DEVICE) for f in ((x,) if codec is None else codec.encode(x)))


def definition(pair, q, keys, values, scale, see):
    """Attention over decoded codes in float64; `see [.., T, S]` says who sees whom."""
    key, value = pair
    keys, values = (tuple(f.cpu() for f in fields) for fields in (keys, values))
    q = q.double() if key is None else key.query(q).double()
    k = keys[0].double() if key is None else key.decode(keys, torch.float64)
    v = values[0].double() if value is None else value.decode(values, torch.float64)
    group = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(group, 1).mT
    scores = scores.masked_fill(~see, -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().nan_to_num() @ v.repeat_interleave(group, 1)
    return out if value is None else value.output(out), lse


def causal(T, S):
    return torch.arange(S) <= (torch.arange(T) + S - T)[:, None]


def drawn_inputs(B, H, Hk, T, S, D, seed=0):
    make = drawn(seed)
    q, k, v = (make(B, h, n, D).bfloat16() for h, n in ((H, T), (Hk, S), (Hk, S)))
    k[..., 3] *= 10
    return q, k, v + 1


def read(pair, q, keys, values, *, workers=3, **options):
    with filled_with_nan():
        out, lse = kernel.read(q.to(DEVICE), keys, values, scale=0.1, workers=workers, **forms(pair), **options)
    assert out.dtype == torch.bfloat16
    return out, lse


def same(found, expected):
    out, lse = expected
    close(found[0], out, MOST)
    assert torch.equal(found[1].cpu() == -torch.inf, lse == -torch.inf)
    close(found[1].nan_to_num(neginf=0), lse.nan_to_num(neginf=0), MOST)


def compare(pair, q, k, v, **options):
    keys, values = encoded(pair[0], k), encoded(pair[1], v)
    see = causal(q.shape[2], k.shape[2])
    found = kernel.refuses(q.to(DEVICE), keys, values, *forms(pair).values())
    assert DEVICE != "cuda" or found is None
    found = read(pair, q, keys, values, **options)
    same(found, definition(pair, q, keys, values, 0.1, see))


def test_some_heads_of_a_layer():
    """Groups of KV heads are written from all heads, find their queries among all, and answer in their places."""
    pair = codecs(64, 4, 4, None, False)
    q, k, v = drawn_inputs(1, 8, 4, 1, 20, 64)
    whole = [encoded(codec, x) for codec, x in zip(pair, (k, v), strict=True)]
    out, lse = torch.full_like(q, torch.nan, device=DEVICE), torch.full((1, 8, 1), torch.nan, device=DEVICE)
    for heads in ([3, 0], [1, 2]):
        fields = [tuple(torch.zeros_like(field[:, heads]) for field in fields) for fields in whole]
        named = torch.tensor(heads, device=DEVICE)
        kernel.write(k.to(DEVICE), v.to(DEVICE), *fields, **forms(pair), heads=named)
        for found, field in zip(sum(fields, ()), sum(whole, ()), strict=True):
            assert torch.equal(found, field[:, heads])
        read(pair, q, *fields, part_of=Part(named, 2, out, lse))
    same((out, lse), definition(pair, q, *whole, 0.1, causal(1, 20)))


@pytest.mark.parametrize("form", ["contiguous", "strided"])
def test_vectors_as_they_come_go_to_a_slot_read_on_the_device(form):
    k, v = (x.to(DEVICE) for x in drawn_inputs(2, 4, 2, 1, 1, 64)[1:])
    k, v = (k, v) if form == "contiguous" else (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    keys, values = (torch.zeros(2, 1, 9, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    heads, slots = torch.tensor([1], device=DEVICE), torch.tensor([7, 7], device=DEVICE)
    kernel.write(k, v, (keys,), (values,), key=None, value=None, start=slots, heads=heads)
    for held, x in ((keys, k), (values, v)):
        assert torch.equal(held[:, :, 7], x[:, 1:, 0])
        assert held.count_nonzero() == x[:, 1:].count_nonzero()


@pytest.mark.parametrize(
    ("bits", "block", "rotate_v"),
    [((4, 4), None, False), ((4, 4), 1, False), ((8, 4), 16, True), ((4, 8), None, True), ((16, 4), None, False),
     ((8, 16), 2, False)],
)  # fmt: skip
def test_read(bits, block, rotate_v):
    pair = codecs(64, *bits, block, rotate_v)
    compare(pair, *drawn_inputs(2, 4, 2, 1, 77, 64))


@pytest.mark.parametrize("D", [128, 256])
def test_wide_heads(D):
    compare(codecs(D, rotate_v=D == 128), *drawn_inputs(1, 2, 1, 1, 70, D))


@pytest.mark.parametrize(("H", "T"), [(2, 3), (6, 5), (16, 2)])
def test_groups_and_several_queries(H, T):
    compare(codecs(64, block=2), *drawn_inputs(1, H, 2, T, 70, 64))


@pytest.mark.parametrize(("S", "workers"), [(1, 7), (63, 1), (64, 2), (65, 3), (130, 7)])
def test_odd_lengths(S, workers):
    compare(codecs(64, block=2), *drawn_inputs(1, 2, 2, 1, S, 64), workers=workers)


def paged(fields, size, seed):
    """Fields `[B, Hk, S, *]` in pools of pages in random order, with the table of pages; other slots hold NaN."""
    B, Hk, S = fields[0].shape[:3]
    n = -(-S // size)
    table = torch.randperm(B * n + 2, generator=torch.Generator().manual_seed(seed))[: B * n].reshape(B, n)
    pools = []
    for field in fields:
        unused = torch.nan if field.is_floating_point() else 255
        pool = field.new_full((B * n + 2, Hk, size, field.shape[3]), unused)
        for b in range(B):
            for i in range(n):
                part = field[b, :, i * size : (i + 1) * size]
                pool[table[b, i], :, : part.shape[1]] = part
        pools.append(pool)
    return tuple(pools), table.to(DEVICE)


@pytest.mark.parametrize(("bits", "size"), [((4, 8), 16), ((16, 4), 5)])
def test_pages_and_lengths(bits, size):
    """A random page table reads what the contiguous codes do, each request as long as it is; one has no key."""
    pair = codecs(64, *bits, block=1)
    q, k, v = drawn_inputs(3, 4, 2, 1, 83, 64)
    keys, values = encoded(pair[0], k), encoded(pair[1], v)
    lengths = torch.tensor([83, 0, 40])
    see = (torch.arange(83) < lengths[:, None])[:, None, None]
    expected = definition(pair, q, keys, values, 0.1, see)
    same(read(pair, q, keys, values, lengths=lengths.to(DEVICE)), expected)
    both, table = paged(keys + values, size, 0)
    pools = both[: len(keys)], both[len(keys) :]
    same(read(pair, q, *pools, lengths=lengths.to(DEVICE).int(), pages=table.int()), expected)


@pytest.mark.parametrize("recent", [None, 9])
def test_positions(recent):
    """Padding, sinks and windows, as a ring holds them."""
    pair = codecs(64)
    q, k, v = drawn_inputs(2, 4, 2, 2, 45, 64)
    keys, values = encoded(pair[0], k), encoded(pair[1], v)
    positions = torch.stack((torch.arange(45) - 3, torch.cat((torch.arange(4), torch.arange(50, 91)))))
    positions[1, 2] = -1
    asked = torch.tensor([[40, 41], [89, 90]])
    p_q, p_k = asked[:, :, None], positions[:, None]
    see = (p_k >= 0) & (p_k <= p_q)
    if recent is not None:
        see &= (p_k < 4) | (p_q - p_k < recent)
    options = {"positions": positions.to(DEVICE), "q_positions": asked.to(DEVICE), "sink": 4, "recent": recent}
    found = read(pair, q, keys, values, **options)
    same(found, definition(pair, q, keys, values, 0.1, see[:, None]))


def test_constant_and_large_vectors():
    """Scales of 1e-8 / 15 and of a thousand, and least numbers far from 0."""
    pair = codecs(64, block=1)
    q, k, v = drawn_inputs(1, 2, 2, 1, 40, 64)
    k[:, :, ::2], v[:, :, ::2] = 0.5, -300.0
    v[:, :, 1] *= 1000
    compare(pair, q, k, v)


@pytest.mark.parametrize(
    ("dtype", "D", "bits", "block", "rotate_v"),
    [(torch.bfloat16, 64, (4, 4), None, False), (torch.float32, 128, (4, 8), None, True),
     (torch.float16, 64, (8, 16), 16, False), (torch.bfloat16, 256, (4, 4), None, True)],
)  # fmt: skip
def test_written_codes_are_the_definition_s(dtype, D, bits, block, rotate_v):
    """To the bit, beside slots that are not touched, from projections laid out token by token."""
    pair = codecs(D, *bits, block, rotate_v)
    make = drawn(1)
    k, v = ((make(2, 19, 2, D) * torch.logspace(-3, 3, D)).to(dtype).transpose(1, 2) for _ in range(2))
    expected = [encoded(codec, x) for codec, x in zip(pair, (k, v), strict=True)]
    found = [tuple(f.new_full((*f.shape[:2], 30, f.shape[3]), 7) for f in fields) for fields in expected]
    kernel.write(k.to(DEVICE), v.to(DEVICE), *found, **forms(pair), start=5)
    for fields, right in zip(found, expected, strict=True):
        for field, exact in zip(fields, right, strict=True):
            assert torch.equal(field[:, :, 5:24], exact)
            assert (field[:, :, :5] == 7).all()
            assert (field[:, :, 24:] == 7).all()


def test_written_to_pages():
    pair = codecs(64)
    _, k, v = drawn_inputs(2, 2, 2, 1, 11, 64)
    starts = torch.tensor([3, 6])
    keys, values = encoded(pair[0], k), encoded(pair[1], v)
    pools = [tuple(f.new_zeros(7, 2, 8, f.shape[3]) for f in fields) for fields in (keys, values)]
    pages = torch.tensor([[5, 2, 0], [1, 6, 3]])
    kernel.write(k.to(DEVICE), v.to(DEVICE), *pools, **forms(pair), start=starts.to(DEVICE), pages=pages.to(DEVICE))
    for fields, right in zip(pools, (keys, values), strict=True):
        for pool, exact in zip(fields, right, strict=True):
            for b in range(2):
                slots = pool[pages[b]].transpose(0, 1).flatten(1, 2)
                assert torch.equal(slots[:, starts[b] : starts[b] + 11], exact[b])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_show(bad):
    pair = codecs(64)
    _, k, v = drawn_inputs(1, 2, 2, 1, 3, 64)
    keys, values = encoded(pair[0], k), encoded(pair[1], v)
    k[0, 0, 1, 5] = v[0, 1, 2, 6] = bad
    kernel.write(k.to(DEVICE), v.to(DEVICE), keys, values, **forms(pair))
    shown = [codec.decode(fields, torch.float32).isnan() for codec, fields in zip(pair, (keys, values), strict=True)]
    assert shown[0][0, 0, 1].any()
    assert shown[1][0, 1, 2].any()
    assert not shown[0][0, 1].any()
    assert not shown[1][0, 0].any()


def store(kind, pair, attend=attend):
    if kind == "ring":
        return Ring(attend, 2, 9, *pair)
    if kind == "split":
        return HeadSplit([((0,), Full(attend, *pair)), ((1,), Ring(attend, 2, 9, *pair))])
    return Full(attend, *pair)


@pytest.mark.parametrize(("kind", "padded"), [("full", True), ("ring", False), ("split", True)])
@torch.no_grad()
def test_stores_read_codes(kind, padded, monkeypatch):
    """A prompt, then token by token, then two at once, against plain torch on a CPU in float64.

    Codes agree to the bit. Outputs do where codes are read, which is all but the prompt.
    """
    q, k, v = drawn_inputs(2, 4, 2, 44, 44, 64)
    pair = codecs(64, 8, 4, 2, rotate_v=True)
    pattern = Pattern.sink(2) | Pattern.window(9)
    pattern = {"full": Pattern.causal(), "ring": pattern,
               "split": Pattern.stack_heads([Pattern.causal(), pattern])}[kind]  # fmt: skip
    padding = torch.tensor([0, 4]) if padded else None
    reads = []
    call = (x.double() for x in (q, k, v))
    expected = run(kind, pair, *call, pattern, padding, kernels=False, monkeypatch=monkeypatch, reads=reads)
    assert not reads
    call = (x.to(DEVICE) for x in (q, k, v))
    padding = padding if padding is None else padding.to(DEVICE)
    found = run(kind, pair, *call, pattern, padding, kernels=True, monkeypatch=monkeypatch, reads=reads)
    assert len(reads) == (6 if kind == "split" else 3)
    for number, ((out, held), (right, exact)) in enumerate(zip(found, expected, strict=True)):
        if number > 0:
            close(out, right, MOST)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(held, exact, strict=True))


def run(kind, pair, q, k, v, pattern, padding, *, kernels, monkeypatch, reads):
    """Outputs of each forward and what the store holds after it."""
    read = kernel.read

    def counted(*arguments, **options):
        reads.append(arguments[0].shape)
        return read(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(paper.device, "refuses", lambda x: None if kernels else "kernels are switched off")
        patch.setattr(kernel, "read", counted)
        held, outs = store(kind, pair), []
        for start, stop in pairwise([0, 40, 41, 42, 44]):
            step = Step(start, stop - start, 2, q.device, padding)
            view = held.append(k[:, :, start:stop], v[:, :, start:stop], step)
            out = view.attend(q[:, :, start:stop], pattern=pattern, step=step, scale=0.1)[0]
            children = held.children if kind == "split" else [held]
            outs.append((out, [f.clone() for child in children for f in child.buffer.read()]))
    return outs


@pytest.mark.parametrize(
    ("kind", "padded", "coded"),
    [("full", True, True), ("ring", True, False), ("split", False, False), ("split", True, True)],
)
@torch.no_grad()
def test_fixed_steps_on_the_kernels(kind, padded, coded, monkeypatch):
    """A prompt, then fixed steps whose kernels write and read, against forwards in plain torch in float64."""
    pair = codecs(64, 8, 4, 2, rotate_v=True) if coded else (None, None)
    q, k, v = drawn_inputs(2, 4, 2, 14, 14, 64)
    pattern = Pattern.sink(2) | Pattern.window(9)
    pattern = {"full": Pattern.causal(), "ring": pattern,
               "split": Pattern.stack_heads([Pattern.causal(), pattern])}[kind]  # fmt: skip
    padding = torch.tensor([0, 4]) if padded else None
    exact, held = store(kind, pair), store(kind, pair)
    exact.append(*(x[:, :, :12].double() for x in (k, v)), Step(0, 12, 2, q.device, padding))
    held.append(*(x[:, :, :12].to(DEVICE) for x in (k, v)), Step(0, 12, 2, torch.device(DEVICE), padding))
    held.fix(8)
    for at in range(12, 14):
        now = slice(at, at + 1)
        step = Step(at, 1, 2, q.device, padding)
        wanted = exact.append(*(x[:, :, now].double() for x in (k, v)), step)
        wanted = wanted.attend(q[:, :, now].double(), pattern=pattern, step=step, scale=0.1)
        padding_there = None if padding is None else padding.to(DEVICE)
        step = Step(at, 1, 2, torch.device(DEVICE), padding_there, at=torch.tensor([at], device=DEVICE))
        with monkeypatch.context() as patch:
            patch.setattr(paper.device, "refuses", lambda x: None)
            patch.setattr(torch.Tensor, "index_copy_", None)
            view = held.put(*(x[:, :, now].to(DEVICE) for x in (k, v)), step, decode)
            found = view.attend(q[:, :, now].to(DEVICE), pattern=pattern, step=step, scale=0.1)
        held.passed()
        same(found, wanted)


def test_gradients_and_what_the_kernel_cannot_do_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(paper.device, "refuses", lambda x: None)
    monkeypatch.setattr(kernel, "read", None)
    q, k, v = (x.to(DEVICE) for x in drawn_inputs(1, 4, 2, 12, 12, 64))
    pair = codecs(64)
    step = Step(0, 12, 1, q.device)
    view = Full(attend, *pair).append(k, v.requires_grad_(), step)
    view.attend(q, pattern=Pattern.causal(), step=step, scale=0.1)[0].sum().backward()
    assert v.grad is not None
    with torch.no_grad():
        view = Full(attend, *pair).append(k, v, step)
        view.attend(q, pattern=Pattern.causal(), step=step, scale=0.1, softcap=5.0)
        view.attend(q, pattern=Pattern.predicate(lambda q, k, h: q - k != 3), step=step, scale=0.1)


def test_what_is_told_of_the_read(monkeypatch):
    pair = codecs(64)
    q = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    causal, other = Pattern.causal(), Pattern.predicate(lambda q, k, h: q - k != 3)
    assert "decoded to be read (kernels run on a CUDA device" in stored.told(q, 2, causal, *pair)
    monkeypatch.setattr(kernel.device, "refuses", lambda tensor: None)
    assert stored.told(q, 2, causal, *pair) == stored.told(q, 2, Pattern.window(5), *pair) == "codes read as they lie"
    assert "torch.float32" in stored.told(q.float(), 2, causal, *pair)
    assert "windows and sinks" in stored.told(q, 2, other, *pair)


def test_refuses_by_name(monkeypatch):
    key, value = codecs(64)
    q, k, v = drawn_inputs(1, 4, 2, 1, 5, 64)
    keys, values = key.encode(k), value.encode(v)
    both = key.form, value.form
    assert "cpu" in kernel.refuses(q, keys, values, *both)
    assert "cpu" in kernel.refuses_write(k, v, keys, values, *both)
    monkeypatch.setattr(kernel.device, "refuses", lambda tensor: None)
    assert kernel.refuses(q, keys, values, *both) is None
    assert "torch.float32" in kernel.refuses(q.float(), keys, values, *both)
    assert "not 128" in kernel.refuses(q.repeat(1, 8, 8, 1), keys, values, *both)
    assert "torch.float32" in kernel.refuses(q, keys, (v.float(),), key.form, None)
    assert "D of 64, 128, 256, not 32" in kernel.refuses(q, paper.quantise(k[..., :32], 4), values, *both)
    assert "next to each other" in kernel.refuses(q, tuple(f[:, :, ::2] for f in keys), values, *both)
    assert "gradients" in kernel.refuses(q.requires_grad_(), keys, values, *both)
    assert "torch.float64" in kernel.refuses_write(k.double(), v, keys, values, *both)
    with pytest.raises(RegardError, match="4, 8 or 16 bits"):
        codecs(64, 5)


def test_the_benchmark_runs():
    _, rows = int4.run(batch=1, tokens=40, heads=2, kv_heads=1, width=64, steps=1, repeats=1)
    assert {row["side"] for row in rows} == {*int4.SIDES, "cudnn", "copy", "torch"}
    assert all(row["us"] > 0 and (row["error"] or 0) <= int4.MOST for row in rows)

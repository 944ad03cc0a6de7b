"""Block lists against the dense relation they stand for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.core.rules import Causal, Either, Phased
from regard.ops.masks import s2
from regard.primitives import block_list as module
from regard.primitives.block_list import BlockList, build
from running import DEVICE

LONG = 200
G = torch.Generator().manual_seed(0)
DOCUMENTS = torch.randint(0, 4, (LONG,), generator=G).sort().values
LEAVES = [
    Pattern.causal(),
    Pattern.window(50),
    Pattern.window(3, block=24),
    Pattern.sink(37),
    Pattern.phases(16, 3, [1]),
    Pattern.dilated(9, 5),
    Pattern.predicate(lambda q, k, h: (q * 7 + k * k) % 3 == 0),
    Pattern.blocks(torch.rand(7, 7, generator=G) < 0.4, 32),
    Pattern.blocks(torch.rand(13, 13, generator=G) < 0.3, 16),
    Pattern.dense(torch.rand(LONG, LONG, generator=G) < 0.02),
    Pattern.document(DOCUMENTS),
    Pattern.full(),
    Pattern.prefix(70),
    Pattern.predicate(lambda q, k, h: (q - k).abs() < 30, causal=False),
    Pattern.predicate(
        lambda q, k, h: (q - k).abs() < 30,
        causal=False,
        cover=lambda q_low, q_high, k_low, k_high: (
            (q_low - k_high < 30) & (k_low - q_high < 30),
            (q_high - k_low < 30) & (k_high - q_low < 30),
        ),
    ),
    Pattern.blocks(torch.rand(7, 7, generator=G) < 0.5, 32, causal=False),
    Pattern.indices(torch.randint(-1, LONG, (LONG, 3), generator=G), causal=False),
    Pattern.document(DOCUMENTS[torch.randperm(LONG, generator=G)], causal=False),
]


@st.composite
def compositions(draw, depth=2):
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(LEAVES))
    kind = draw(st.sampled_from(["and", "or", "not"]))
    a = draw(compositions(depth=depth - 1))
    if kind == "not":
        return ~a
    b = draw(compositions(depth=depth - 1))
    return a & b if kind == "and" else a | b


@st.composite
def patterns(draw):
    heads = draw(st.integers(1, 3))
    if heads == 1:
        return draw(compositions())
    return Pattern.stack_heads([draw(compositions()) for _ in range(heads)])


def check(blocks, dense):
    """It is `dense`, also turned, its lists are in order, and nothing in it is told twice."""
    mine, turned = blocks.to_dense(), blocks.turned()
    assert torch.equal(mine.cpu().expand_as(dense), dense)
    assert torch.equal(turned.to_dense(), mine)
    back = turned.turned()
    for name in ("full", "count", "index", "part"):
        assert torch.equal(getattr(back, name), getattr(blocks, name)), name
    tensors = ("full", "count", "index", "part", "bounds", "bits")
    blocks = replace(blocks, **{name: getattr(blocks, name).cpu() for name in tensors})
    assert blocks.density == pytest.approx(float(blocks.count.double().mean()) / blocks.blocks[1])
    slot = torch.arange(blocks.index.shape[-1])
    used, whole = slot < blocks.count[..., None], slot < blocks.full[..., None]
    assert torch.equal(blocks.part == -1, whole | ~used)
    assert not blocks.index[~used].any()
    for group in (whole, used & ~whole):
        together = group[..., 1:] & group[..., :-1]
        assert (blocks.index.diff(dim=-1) >= 0)[together].all()
    for table in (blocks.bounds, blocks.bits):
        assert len(table.unique(dim=0)) == len(table)
    runs = blocks.bits.unsqueeze(-1) >> torch.arange(32) & 1
    edges = runs.flatten(-2).diff(dim=-1, prepend=torch.zeros(1).int().expand(*runs.shape[:2], 1)).abs()
    assert not len(blocks.bits) or ((edges.sum(-1) > 2).any(-1) | (blocks.bits == 0).flatten(1).all(-1)).all()


SIZES = st.sampled_from([(64, 64), (128, 64), (16, 32), (32, 128)])


@settings(max_examples=80, deadline=None)
@given(patterns(), st.integers(1, LONG), st.integers(1, LONG), SIZES)
def test_a_block_list_is_its_pattern(pattern, rows, keys, size):
    """At any lengths, more rows than keys too."""
    at = torch.arange(keys)[None]
    blocks = build(pattern, rows, keys, size, device=DEVICE)
    check(blocks, pattern.allow(torch.arange(keys - rows, keys)[None], at))
    alike = build(pattern, torch.arange(keys - rows, keys)[None], at, size, device=DEVICE)
    assert torch.equal(alike.to_dense(), blocks.to_dense())


@settings(max_examples=60, deadline=None)
@given(patterns(), st.integers(1, LONG), SIZES, st.data())
def test_positions_of_rows_of_a_batch_and_of_heads(pattern, length, size, data):
    """Padding on either side, other orders, and heads that hold different keys."""
    kind = data.draw(st.sampled_from(["left", "minus one", "right", "shuffled", "by head"]))
    at, padding = torch.arange(length), torch.tensor([[0], [length // 3], [length - 1]])
    q = at - padding
    if kind == "minus one":
        q = q.clamp(min=-1)
    if kind == "right":
        q = at.where(at < length - padding, -1)
    k = q
    if kind == "shuffled":
        k = torch.stack([row[torch.randperm(length)] for row in q])
    if kind == "by head":
        count = pattern.heads or 2
        k = torch.stack([torch.stack([row[torch.randperm(length)] for row in q]) for _ in range(count)], 1)
    check(build(pattern, q, k, size, device=DEVICE), pattern.allow(q, k))


@pytest.mark.parametrize("shift", [1, 31, 32, 63])
def test_a_rule_that_settles_a_block_is_told_from_one_that_leaves_it_open(shift):
    """Blocks agree in one part of the rule and differ in the other, where blocks of rows and keys are `shift` apart."""
    rule = Either(Causal(), Phased(16, 4, (1,)))
    pattern = Pattern((rule,), cut=False)
    check(build(pattern, 400, 400 + shift, (64, 64)), pattern.to_dense(400, 400 + shift)[None])


def test_equal_heads_share_a_list_and_equal_cuts_a_row():
    window = Pattern.window(300) | Pattern.sink(10)
    blocks = build(Pattern.stack_heads([window] * 4), 4096, 4096, (64, 64), heads=8)
    assert blocks.count.shape == (1, 1, 64)
    # The diagonal, the window's edge (300 is no multiple of 64: two), the sink, and two runs more where
    # edge and sink meet in a block: it is listed twice.
    assert len(blocks.bounds) == 6
    assert not len(blocks.bits)
    mixed = build(Pattern.stack_heads([window, Pattern.causal()]), 4096, 4096, (64, 64), heads=8)
    assert mixed.count.shape == (1, 8, 64)
    assert len(mixed.bounds) == 6
    assert torch.equal(mixed.count[:, 0], mixed.count[:, 3])
    assert torch.equal(mixed.count[:, 4], torch.arange(1, 65)[None])


def test_a_long_list_of_s2_looks_at_few_blocks(monkeypatch):
    """Blocks that are cut alike are looked at once, and no tensor is as large as rows x keys."""
    seen, real = [], module.cuts
    monkeypatch.setattr(module, "cuts", lambda masks, count, *more: seen.append(count) or real(masks, count, *more))
    where = Where(0, 1, 8, 8, 64)
    pattern = s2.allow(where, block=64, local=4, stride=8, offset=0, homogeneous=False, dense_heads=1, holes="leave")
    blocks = build(pattern, 8192, 8192, (128, 128))
    assert max(seen) < 40
    assert len(blocks.bounds) < 10
    at = torch.arange(8000, 8128)[None]
    rows = build(pattern, at, torch.arange(8192)[None], (128, 128)).to_dense()
    assert torch.equal(rows, pattern.allow(at, torch.arange(8192)[None]))


def test_tables_are_not_looked_at():
    """A table of blocks as large as the kernel's, or smaller or larger by a whole factor, is arithmetic on blocks."""
    for size, most in ((64, 1), (128, 1), (256, 1), (32, 18)):
        table = torch.rand(3, 2048 // size, 2048 // size, generator=G) < 0.5
        blocks = build(Pattern.blocks(table, size, causal=False), 2048, 2048, (64, 64))
        assert len(blocks.bounds) + len(blocks.bits) <= most + 1
        assert torch.equal(blocks.to_dense()[0], Pattern.blocks(table, size, causal=False).to_dense(2048))


def test_lists_are_kept_until_a_tensor_changes():
    table = torch.eye(4, dtype=torch.bool)
    pattern = Pattern.blocks(table, 32, causal=False)
    first = build(pattern, 128, 128, (32, 32))
    assert build(pattern, 128, 128, (32, 32)) is first
    assert build(Pattern.window(5), 128, 128, (32, 32)) is build(Pattern.window(5), 128, 128, (32, 32))
    table[0, 3] = True
    assert build(pattern, 128, 128, (32, 32)).count[0, 0].tolist() == [2, 1, 1, 1]
    limit = torch.tensor(5)
    pattern = Pattern.predicate(lambda q, k, h: q - k < limit)
    assert int(build(pattern, 64, 64, (32, 32)).to_dense().sum()) == 64 * 5 - 10
    limit.fill_(1)
    assert int(build(pattern, 64, 64, (32, 32)).to_dense().sum()) == 64


def test_a_list_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        blocks = build(Pattern.window(11), 77, 77, (32, 32))
        turned = blocks.turned()
    for made in (blocks, turned):
        assert not any(t.is_inference() for t in (made.full, made.count, made.index, made.part, made.bounds, made.bits))


@pytest.mark.parametrize("keys", [128, 150])
def test_a_table_made_at_run_time(keys):
    table = torch.rand(2, 3, 4, -(-keys // 32), generator=G) < 0.5
    blocks = BlockList.from_table(table, (64, 32), 200, keys)
    dense = table.repeat_interleave(64, 2).repeat_interleave(32, 3)[:, :, :200, :keys]
    assert torch.equal(blocks.to_dense(), dense)
    assert torch.equal(blocks.turned().to_dense(), dense)
    most = int(table.sum(-1).max())
    assert BlockList.from_table(table, (64, 32), 200, keys, most).index.shape[-1] == most
    # Turned without a look at the device, it is what sorting its entries makes, with room for more; kernels read it
    # line by line.
    turned, slow = blocks.turned(), replace(blocks, chosen=False).turned()
    assert all(getattr(turned, name).is_contiguous() for name in ("full", "count", "index", "part"))
    assert all(torch.equal(getattr(turned, name), getattr(slow, name)) for name in ("full", "count"))
    width = slow.index.shape[-1]
    assert all(torch.equal(getattr(turned, name)[..., :width], getattr(slow, name)) for name in ("index", "part"))


TWO = Pattern.stack_heads([Pattern.causal(), Pattern.window(3)])


def ranges(*pair):
    return Pattern.predicate(lambda q, k, h: q > k, cover=lambda *at: pair)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(Pattern.causal(), 8, 8, (48, 64)), r"64, 128 keys, got \(48, 64\)"),
        (lambda: build(Pattern.causal(), 8, 8, (64, 16)), r"got \(64, 16\)"),
        (lambda: build(Pattern.causal(), 0, 8, (64, 64)), "got 0 rows and 8 keys"),
        (lambda: build(TWO, 8, 8, (64, 64), heads=3), "2 heads .* 3 heads"),
        (lambda: build(Pattern.causal(), 8, torch.arange(8)[None], (64, 64)), "two tensors or as two numbers"),
        (lambda: build(Pattern.causal(), torch.arange(8), torch.arange(8)[None], (64, 64)), r"\[8\]"),
        (lambda: build(Pattern.causal(), torch.zeros(2, 8).int(), torch.zeros(3, 8).int(), (64, 64)), "2 rows .* 3"),
        (lambda: build(TWO, torch.zeros(1, 8).int(), torch.zeros(1, 3, 8).int(), (64, 64)), "2 heads over keys of 3"),
        (lambda: BlockList.from_table(torch.ones(1, 1, 2, 2), (64, 64), 128, 128), "bool .*float32"),
        (lambda: BlockList.from_table(torch.ones(1, 1, 2, 3).bool(), (64, 64), 128, 128), r"\[B, H, 2, 2\]"),
        (lambda: build(ranges(torch.tensor(1), torch.tensor(1)), 8, 8, (64, 64)), "two bool tensors, got torch.int64"),
    ],
)
def test_what_was_written_wrong_is_named(make, message):
    with pytest.raises(RegardError, match=message):
        make()

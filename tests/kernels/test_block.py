"""Attention over lists of blocks by its kernels, against the definition in float64: interpreted, or on a GPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.kernels import device
from regard.kernels.attention import block
from regard.kernels.attention.arguments import lists
from regard.ops import blocks as ops
from regard.ops.attention import attend, choose
from regard.primitives.block_list import BlockList, build
from regard.primitives.reference import reference
from running import DEVICE, FLOATS, close, drawn, filled_with_nan


def listed(mask, size, heads=None):
    """The block list of any `mask [T, S]` or `[heads, T, S]`."""
    *_, T, S = mask.shape
    pattern = Pattern.dense(mask, causal=False)
    return build(pattern, torch.arange(T)[None], torch.arange(S)[None], size, heads)


def drawn_mask(seed, heads, T, S, size):
    """Blocks that are whole, empty, cut by an interval a row, or anyhow; the row in the middle sees nothing."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (heads, -(-T // size[0]), -(-S // size[1])), generator=generator)
    kind = kind.repeat_interleave(size[0], 1)[:, :T].repeat_interleave(size[1], 2)[..., :S]
    i, j = torch.arange(T)[:, None], torch.arange(S)
    band = (j % size[1] >= i % 5) & (j % size[1] < 9 + i % 13)
    anyhow = torch.rand(heads, T, S, generator=generator) < 0.5
    mask = (kind == 1) | ((kind == 2) & band) | ((kind == 3) & anyhow)
    mask[:, T // 2] = False
    return mask


def check(blocks, B, H, Hk, D, *, dtype=torch.float32, scale=0.3, softcap=None, change=lambda x: x):
    """Output, lse and every gradient, those of the lse among them; gives what was found."""
    T, S = blocks.rows, blocks.keys
    make = drawn(0)
    q, k, v = (change(make(B, heads, n, D).to(dtype)) for heads, n in ((H, T), (Hk, S), (Hk, S)))
    dout, dlse = make(B, H, T, D).to(dtype), make(B, H, T).float()
    mask = blocks.to_dense()
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wide = [exact[0], *(x.repeat_interleave(H // Hk, 1) for x in exact[1:])]
    seen = mask.repeat_interleave(H // mask.shape[1], 1)
    expected = reference(*wide, mask=seen, scale=scale, softcap=softcap)
    empty = ~seen.any(-1).expand(B, H, T)
    slopes = torch.autograd.grad(expected, exact, [dout.double(), dlse.double().masked_fill(empty, 0)])
    here = [x.to(DEVICE).detach().requires_grad_() for x in (q, k, v)]
    if DEVICE == "cuda":
        blocks = moved(blocks)
    with filled_with_nan():
        out, lse = block.attend(*here, blocks, scale=scale, softcap=softcap)
        found = torch.autograd.grad([out, lse], here, [dout.to(DEVICE), dlse.to(DEVICE)])
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(lse.cpu() == -torch.inf, empty)
    assert not out.cpu()[empty].any()
    assert not found[0].cpu()[empty].any()
    close(out, expected[0], 2 * FLOATS[dtype])
    close(lse.cpu().masked_fill(empty, 0), expected[1].masked_fill(empty, 0), FLOATS[torch.float32])
    for one, other in zip(found, slopes, strict=True):
        close(one, other, 4 * FLOATS[dtype])
    return out, lse, *found


def moved(blocks):
    """The same list on the GPU."""
    tensors = {name: x.to(DEVICE) for name, x in vars(blocks).items() if isinstance(x, torch.Tensor)}
    return replace(blocks, **tensors)


@pytest.mark.parametrize("lists", [1, 2, 4])
def test_grouped_heads_with_lists_of_one_of_each_key_head_and_of_each_query_head(lists):
    mask = drawn_mask(lists, lists, 27, 50, (16, 32))
    check(listed(mask, (16, 32)), 1, 4, 2, 16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype):
    check(listed(drawn_mask(0, 1, 70, 100, (32, 64)), (32, 64)), 1, 2, 1, 32, dtype=dtype)


@pytest.mark.parametrize(
    ("D", "size"), [(64, (64, 32)), (128, (64, 128)), (64, (128, 64)), (128, (128, 128)), (256, (16, 64))]
)
def test_sizes_of_heads_and_blocks(D, size):
    check(listed(drawn_mask(1, 1, size[0] + 9, size[1] + 20, size), size), 1, 1, 1, D, dtype=torch.float16)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 40), (33, 31), (64, 64)])
def test_lengths(rows, keys):
    positions = torch.arange(keys - rows, keys)[None], torch.arange(keys)[None]
    check(build(Pattern.causal(), *positions, (16, 32)), 1, 2, 1, 16)


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scale_and_softcap(scale, softcap):
    check(listed(drawn_mask(2, 1, 40, 60, (32, 32)), (32, 32)), 1, 1, 1, 16, scale=scale, softcap=softcap)


def test_padding_gives_every_batch_row_its_own_list():
    positions = torch.arange(45)[None] - torch.tensor([[7], [44]])
    pattern = Pattern.stack_heads([Pattern.window(9), Pattern.causal()])
    check(build(pattern, positions, positions, (32, 32)), 2, 2, 2, 16)


def test_packed_batches():
    ends = torch.tensor([0] * 13 + [1] * 30 + [2] * 20)
    pattern = Pattern.predicate(lambda q, k, head: ends[q.clamp(min=0)] == ends[k.clamp(min=0)])
    at = torch.arange(63)[None]
    check(build(pattern, at, at, (16, 32)), 1, 2, 2, 16)


def test_nothing_is_seen():
    at = torch.arange(40)[None]
    out, _, *slopes = check(build(~Pattern.causal(), at, at, (16, 32)), 1, 2, 1, 16)
    assert not out.any()
    assert not any(x.any() for x in slopes)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # heads inside tokens
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),  # channels far apart
        lambda x: torch.cat([x, x], -1)[..., 1 : x.shape[-1] + 1],  # no address fits the copy engine
        lambda x: x[:, :1].expand_as(x),  # one head for all
    ],
)
def test_strides(change):
    check(listed(drawn_mask(3, 1, 20, 40, (32, 32)), (32, 32)), 2, 2, 2, 16, change=change)


def test_large_scores_do_not_overflow():
    check(listed(drawn_mask(4, 1, 40, 40, (16, 32)), (16, 32)), 1, 1, 1, 16, scale=20.0)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_wanted(wanted):
    blocks = listed(drawn_mask(5, 1, 20, 40, (32, 32)), (32, 32))
    blocks = moved(blocks) if DEVICE == "cuda" else blocks
    make = drawn(0)
    inputs = [make(1, 2, n, 16).float().to(DEVICE) for n in (20, 40, 40)]

    def slopes(of):
        leaves = [x.clone().requires_grad_(i in of) for i, x in enumerate(inputs)]
        out, _ = block.attend(*leaves, blocks, scale=0.3)
        return torch.autograd.grad(out.sum(), [leaves[i] for i in of])

    everything = slopes((0, 1, 2))
    for i, one in zip(wanted, slopes(wanted), strict=True):
        close(one, everything[i], FLOATS[torch.float32])


@settings(max_examples=3 if DEVICE == "cpu" else 50, deadline=None, derandomize=True)
@given(st.integers(0, 2**20), st.integers(1, 60), st.integers(1, 60), st.sampled_from([(16, 32), (32, 32), (16, 64)]))
def test_any_table_of_blocks(seed, rows, keys, size):
    check(listed(drawn_mask(seed, 2, rows, keys, size), size), 1, 2, 2, 16)


@pytest.mark.parametrize("keys", [150, 160])
def test_blocks_chosen_at_run_time(keys):
    table = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(keys)) < 0.5
    check(BlockList.from_table(table, (32, 32), 90, keys), 2, 4, 2, 16)


def test_what_does_not_belong_together_is_refused():
    at = torch.arange(40)[None]
    blocks = build(Pattern.causal(), at, at, (16, 32))
    q, k = torch.randn(1, 3, 40, 16), torch.randn(1, 2, 40, 16)
    with pytest.raises(RegardError, match="do not divide"):
        block.attend(q, k, k, blocks, scale=1.0)
    with pytest.raises(RegardError, match="40 rows and 40 keys"):
        block.attend(q[:, :2], k[:, :, 1:], k[:, :, 1:], blocks, scale=1.0)
    stacked = build(Pattern.stack_heads([Pattern.window(n) for n in (1, 2, 3)]), at, at, (16, 32))
    with pytest.raises(RegardError, match="3 heads"):
        block.attend(q[:, :2], k, k, stacked, scale=1.0)


def test_kernels_know_without_a_look_whether_bits_are_needed():
    at = torch.arange(300)[None]
    needed = [build(p, at, at, (64, 64)) for p in (Pattern.window(99), Pattern.predicate(odd))]
    assert [lists(blocks)[-1] is None for blocks in needed] == [True, False]
    table = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    assert lists(BlockList.from_table(table, (64, 64), 300, 300))[-1] is None


def odd(q, k, head):
    return (q + k) % 2 == 1


@pytest.fixture
def small_blocks(monkeypatch):
    """`attend` takes small blocks, and takes them on any device."""
    monkeypatch.setattr(ops, "SIZE", (16, 32))
    monkeypatch.setattr(ops, "PAIRS", 1)
    monkeypatch.setattr(device, "refuses", lambda tensor: None)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "options",
    [
        {"pattern": None, "causal": False},
        {"pattern": Pattern.causal()},
        {"pattern": Pattern.window(7) | Pattern.sink(2), "softcap": 3.0},
        {"pattern": Pattern.full(), "k_positions": torch.arange(40)[None] - torch.tensor([[0], [5]])},
        {"pattern": Pattern.window(9), "q_positions": torch.arange(20)[None] + torch.tensor([[0], [20]])},
    ],
)
def test_attend_by_blocks(options):
    make = drawn(0)
    q, k, v = (make(2, heads, n, 16).float().to(DEVICE) for heads, n in ((4, 20), (2, 40), (2, 40)))
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out, lse = attend(q, k, v, backend="block", **options)
    expected = attend(q, k, v, backend="reference", **options)
    close(out, expected[0], FLOATS[torch.float32])
    assert torch.equal(lse == -torch.inf, expected[1] == -torch.inf)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_chosen_where_a_mask_would_be_needed():
    q = torch.zeros(1, 2, 40, 16, device=DEVICE)
    assert choose(q, q, q, pattern=Pattern.window(3))[0] == "block"
    assert choose(q, q, q, pattern=Pattern.causal())[0] != "block"
    assert choose(q, q, q, pattern=Pattern.window(3), bias=torch.zeros(40, 40, device=DEVICE))[0] != "block"
    with pytest.raises(RegardError, match=r"'block' refuses: .* bias"):
        choose(q, q, q, bias=torch.zeros(40, 40, device=DEVICE), backend="block")


def test_blocks_named_off_a_gpu_are_refused():
    q = torch.zeros(1, 2, 40, 16)
    with pytest.raises(RegardError, match=r"'block' refuses: .*CUDA"):
        attend(q, q, q, pattern=Pattern.window(3), backend="block")


HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not HOPPER, reason="the kernels of hopper.py need a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "group", "softcap"), [(128, 1, None), (128, 4, None), (64, 2, None), (128, 2, 3.0)])
def test_kernels_for_hopper(D, group, softcap, dtype, monkeypatch):
    monkeypatch.setattr(block, "on_hopper", lambda *_: True)
    blocks = listed(drawn_mask(6, 2, 700, 900, (128, 128)), (128, 128))
    check(blocks, 2, 2 * group, 2, D, dtype=dtype, scale=D**-0.5, softcap=softcap)


@pytest.mark.skipif(not HOPPER, reason="the kernels of hopper.py need a Hopper GPU")
@pytest.mark.parametrize("group", [1, 2])
def test_programs_for_hopper_take_tile_after_tile(group):
    # 24 blocks of keys of 4 heads in 4 batch rows, more than two for each multiprocessor.
    blocks = listed(drawn_mask(7, 4, 300, 3000, (128, 128)), (128, 128))
    check(blocks, 4, 4 * group, 4, 128, dtype=torch.bfloat16, scale=128**-0.5)


@pytest.mark.skipif(not HOPPER, reason="elsewhere one kernel gives the same in every run")
def test_deterministic_algorithms_give_the_same_in_every_run():
    blocks = listed(drawn_mask(6, 2, 700, 900, (128, 128)), (128, 128))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (check(blocks, 1, 4, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_refusals_say_why():
    q = torch.zeros(1, 2, 40, 16, device=DEVICE)
    if DEVICE == "cpu":
        assert "CUDA" in block.refuses(q, q, q)
        return
    assert block.refuses(q, q, q) is None
    assert "dtype" in block.refuses(q, q.half(), q)
    assert "D = Dv" in block.refuses(q[..., :12], q[..., :12], q[..., :12])
    assert "blocks of" in block.refuses(q, q, q, size=(16, 48))
    assert "nothing" in block.refuses(q[:, :, :0], q, q)

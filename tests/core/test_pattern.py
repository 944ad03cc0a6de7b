"""Pattern against brute force over positions, and its reach against actual eviction."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.core.pattern import Pattern, Reach

LENGTH = 13


def brute(allowed, queries, keys):
    """Dense bool of `allowed(q, k)` with the causal cut, by a Python loop."""
    return torch.tensor([[0 <= k <= q and bool(allowed(q, k)) for k in keys] for q in queries])


def brute_two_sided(allowed, queries, keys):
    return torch.tensor([[q >= 0 and k >= 0 and bool(allowed(q, k)) for k in keys] for q in queries])


def odd(q, k, head):
    return (q + k) % (head + 2) == 0


IDS = torch.tensor([0, 0, 0, 1, 1, 5, 5, 5, 5, 2, 2, 0])
TABLE = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
MASK = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.5
INDEX = torch.randint(-1, LENGTH, (LENGTH, 5), generator=torch.Generator().manual_seed(2))

LEAVES = [
    (Pattern.causal(), lambda q, k: True),
    (Pattern.window(1), lambda q, k: q == k),
    (Pattern.window(4), lambda q, k: q - k < 4),
    (Pattern.sink(0), lambda q, k: False),
    (Pattern.sink(3), lambda q, k: k < 3),
    (Pattern.predicate(odd), lambda q, k: (q + k) % 2 == 0),
    (
        Pattern.predicate(lambda q, k, head: (q - k < 3) & ((q + k) % 2 == 0), reach=Reach(0, 3)),
        lambda q, k: q - k < 3 and (q + k) % 2 == 0,
    ),
    (Pattern.blocks(TABLE[0], 3), lambda q, k: q < 12 and k < 12 and TABLE[0, q // 3, k // 3]),
    (Pattern.dense(MASK), lambda q, k: MASK[q, k]),
    (Pattern.indices(INDEX), lambda q, k: k in INDEX[q].tolist()),
    (Pattern.phases(2, 3, [0, 2]), lambda q, k: k // 2 % 3 in (0, 2)),
    (Pattern.window(2, block=3), lambda q, k: q // 3 - k // 3 < 2),
    (Pattern.dilated(3, 2), lambda q, k: q - k in (0, 2, 4)),
    (Pattern.document(IDS), lambda q, k: q < 12 and k < 12 and IDS[q] == IDS[k]),
]


def near(q, k, head):
    return (q - k).abs() < 3


TWO_SIDED = [
    (Pattern.full(), lambda q, k: True),
    (Pattern.prefix(4), lambda q, k: k <= q or k < 4),
    (Pattern.predicate(near, causal=False), lambda q, k: abs(q - k) < 3),
    (
        Pattern.predicate(
            near,
            causal=False,
            cover=lambda q_low, q_high, k_low, k_high: (
                (q_low - k_high < 3) & (k_low - q_high < 3),
                (q_high - k_low < 3) & (k_high - q_low < 3),
            ),
        ),
        lambda q, k: abs(q - k) < 3,
    ),
    (Pattern.blocks(TABLE[1], 3, causal=False), lambda q, k: q < 12 and k < 12 and TABLE[1, q // 3, k // 3]),
    (Pattern.dense(MASK, causal=False), lambda q, k: MASK[q, k]),
    (Pattern.indices(INDEX, causal=False), lambda q, k: k in INDEX[q].tolist()),
    (Pattern.document(IDS, causal=False), lambda q, k: q < 12 and k < 12 and IDS[q] == IDS[k]),
]


@st.composite
def compositions(draw, depth=3):
    """A random composition and the same as a plain function."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(LEAVES))
    kind = draw(st.sampled_from(["and", "or", "not"]))
    p, f = draw(compositions(depth=depth - 1))
    if kind == "not":
        return ~p, lambda q, k: not f(q, k)
    r, g = draw(compositions(depth=depth - 1))
    if kind == "and":
        return p & r, lambda q, k: f(q, k) and g(q, k)
    return p | r, lambda q, k: f(q, k) or g(q, k)


@st.composite
def mixtures(draw, depth=3):
    """A random composition of cut and two-sided patterns, and the same as a plain function that says all."""
    if depth == 0 or draw(st.booleans()):
        p, f = draw(st.sampled_from(LEAVES + TWO_SIDED))
        return p, (lambda q, k: k <= q and f(q, k)) if p.cut else f
    kind = draw(st.sampled_from(["and", "or", "not"]))
    p, f = draw(mixtures(depth=depth - 1))
    if kind == "not":
        return ~p, (lambda q, k: k <= q and not f(q, k)) if p.cut else (lambda q, k: not f(q, k))
    r, g = draw(mixtures(depth=depth - 1))
    if kind == "and":
        return p & r, lambda q, k: f(q, k) and g(q, k)
    return p | r, lambda q, k: f(q, k) or g(q, k)


@settings(max_examples=300, deadline=None)
@given(mixtures(), st.integers(1, LENGTH))
def test_two_sided_composition_is_plain_set_algebra(pair, rows):
    pattern, allowed = pair
    expected = brute_two_sided(allowed, range(LENGTH - rows, LENGTH), range(LENGTH))
    assert torch.equal(pattern.to_dense(rows, LENGTH)[0], expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(mixtures(depth=2), min_size=1, max_size=3))
def test_heads_of_both_kinds_stack(pairs):
    stack = Pattern.stack_heads([pattern for pattern, _ in pairs])
    assert stack.cut == all(pattern.cut for pattern, _ in pairs)
    dense = stack.to_dense(LENGTH)
    for h, (pattern, allowed) in enumerate(pairs):
        assert torch.equal(dense[h], brute_two_sided(allowed, range(LENGTH), range(LENGTH)))
        assert torch.equal(stack.head(h).to_dense(LENGTH)[0], dense[h])
        assert stack.head(h).cut or not pattern.cut


@settings(max_examples=300, deadline=None)
@given(mixtures(), *[st.integers(0, LENGTH - 1)] * 4)
def test_cover_is_sound(pair, a, b, c, d):
    """What a rule says of ranges holds for every pair in them."""
    pattern, allowed = pair
    ranges = [torch.tensor([x]) for x in (*sorted((a, b)), *sorted((c, d)))]
    some, every = pattern.relations()[0].cover(*ranges)
    q_low, q_high, k_low, k_high = map(int, ranges)
    seen = brute_two_sided(allowed, range(q_low, q_high + 1), range(k_low, k_high + 1))
    assert some or not seen.any()
    assert seen.all() or not every


EXACT = [
    Pattern.full(),
    Pattern.causal(),
    Pattern.window(50),
    Pattern.window(2, block=30),
    Pattern.sink(70),
    Pattern.phases(20, 4, [0, 2]),
    Pattern.blocks(TABLE[0], 64),
    Pattern.blocks(TABLE[0].repeat(4, 4), 16),
    Pattern.document(torch.arange(250) // 40),
]


@pytest.mark.parametrize("pattern", EXACT, ids=repr)
def test_cover_settles_all_that_can_be_settled(pattern):
    rule, at = pattern.rules[0], torch.arange(256)
    tiles = rule(at[:, None], at[None]).expand(256, 256).reshape(4, 64, 4, 64).transpose(1, 2).flatten(2)
    low = torch.arange(0, 256, 64)
    some, every = rule.cover(low[:, None], low[:, None] + 63, low, low + 63)
    assert torch.equal(some.expand(4, 4), tiles.any(-1))
    assert torch.equal(every.expand(4, 4), tiles.all(-1))


def test_two_sided_patterns_know_what_they_are():
    full, window = Pattern.full(), Pattern.window(3)
    assert full.is_full
    assert not full.is_causal
    assert full & Pattern.causal() == Pattern.causal()
    assert full & window == window
    assert window | full == full
    assert ~full | window == window
    assert ~~Pattern.prefix(4) == Pattern.prefix(4)
    assert Pattern.prefix(0) == Pattern.causal()
    assert (Pattern.prefix(4) & Pattern.causal()).is_causal
    mixed = Pattern.stack_heads([window, full])
    assert mixed.head(0) == window
    assert mixed.head(1) == full
    assert mixed.select_heads([0, 0]) == Pattern.stack_heads([window, window])
    assert repr(full) == "full"
    assert repr(Pattern.prefix(4)) == "causal | sink 4 (two-sided)"
    assert repr(mixed) == "head 0: window 3 & causal; head 1: full (two-sided)"
    assert full.density(10) == 1
    assert Pattern.prefix(4).density(10) == pytest.approx((55 + 6) / 100)
    with pytest.raises(RegardError, match=r"prefix|causal \| sink 4"):
        Pattern.prefix(4).reach()


@settings(max_examples=150, deadline=None)
@given(compositions(), st.integers(1, LENGTH))
def test_composition_is_set_algebra_inside_the_causal_cut(pair, rows):
    pattern, allowed = pair
    expected = brute(allowed, range(LENGTH - rows, LENGTH), range(LENGTH))
    assert torch.equal(pattern.to_dense(rows, LENGTH)[0], expected)


@settings(max_examples=150, deadline=None)
@given(compositions())
def test_evicting_what_reach_gives_up_changes_no_later_row(pair):
    pattern, _ = pair
    (reach,) = pattern.reach()
    seen = pattern.to_dense(LENGTH)[0]
    for q in range(LENGTH):
        for k in range(q + 1):
            held = reach.needs(torch.tensor(q), torch.tensor(k))
            assert held or not seen[q, k], (pattern, q, k)


def test_reach_is_tight_where_a_store_lives_on_it():
    window, sink = Pattern.window(4), Pattern.sink(3)
    assert (sink | window).reach() == (Reach(3, 4),)
    assert ((sink | window) & Pattern.predicate(odd)).reach() == (Reach(3, 4),)
    assert ((sink | window) & Pattern.causal()).reach() == (Reach(3, 4),)
    assert (window & Pattern.window(9)).reach() == (Reach(0, 4),)
    assert (~~window).reach() == (Reach(0, 4),)
    assert (~(~window | Pattern.predicate(odd))).reach() == (Reach(0, 4),)
    assert (window | Pattern.dense(MASK)).reach() == (Reach(0, None),)
    assert (~Pattern.causal()).reach() == (Reach(0, 0),)
    phases = Pattern.phases(4, 3, [1])
    assert (phases | window).reach() == (Reach(0, 4, ((4, 3, (1,)),)),)
    assert ((phases | window) & window).reach() == (phases & window).reach() == (Reach(0, 4),)
    assert (phases & Pattern.phases(4, 6, [1])).reach() == (Reach(0, 0, ((4, 6, (1,)),)),)
    assert (phases | Pattern.causal()).reach() == (Reach(0, None),)
    needed = (phases | window).reach()[0].needs(torch.tensor(40), torch.arange(41))
    assert needed.tolist() == [k // 4 % 3 == 1 or 40 - k < 4 for k in range(41)]


@settings(max_examples=60, deadline=None)
@given(compositions(), st.integers(1, LENGTH))
def test_density_is_the_mean_of_the_dense_triangle(pair, length):
    pattern, _ = pair
    expected = int(pattern.to_dense(length).sum()) / (length * (length + 1) / 2)
    assert pattern.density(length) == pytest.approx(expected)


def test_density_over_several_blocks_and_heads():
    window = Pattern.window(100)
    assert window.density(700) == pytest.approx((100 * 101 / 2 + 600 * 100) / (700 * 701 / 2))
    both = Pattern.stack_heads([window, Pattern.causal()])
    assert both.density(700, heads=4) == pytest.approx((1 + window.density(700)) / 2)


def test_per_head_patterns_follow_their_heads():
    heads = Pattern.stack_heads([Pattern.window(2), Pattern.causal(), Pattern.dense(MASK)])
    mixed = heads & (Pattern.sink(2) | Pattern.window(3))
    dense = mixed.to_dense(LENGTH, heads=6)
    assert dense.shape == (6, LENGTH, LENGTH)
    for h in range(3):
        alone = mixed.head(h)
        assert alone.heads is None
        for query_head in (2 * h, 2 * h + 1):
            assert torch.equal(dense[query_head], alone.to_dense(LENGTH)[0])
    chosen = mixed.select_heads(torch.tensor([2, 0]))
    assert chosen.heads == 2
    assert torch.equal(chosen.to_dense(LENGTH), dense[[4, 0]])
    told = Pattern.predicate(odd, heads=3).to_dense(LENGTH)
    for h in range(3):
        assert torch.equal(told[h], brute(lambda q, k, h=h: (q + k) % (h + 2) == 0, range(LENGTH), range(LENGTH)))
    assert torch.equal(Pattern.blocks(TABLE, 4).to_dense(12)[1], Pattern.blocks(TABLE[1], 4).to_dense(12)[0])
    stacked = torch.stack([INDEX, INDEX.flip(0)])
    assert torch.equal(Pattern.indices(stacked).to_dense(LENGTH)[1], Pattern.indices(INDEX.flip(0)).to_dense(LENGTH)[0])


def test_positions_of_rows_and_heads():
    """Padding is negative; each KV head may hold its own keys, in any order."""
    pattern = Pattern.sink(2) | Pattern.window(3)
    q = torch.arange(6)[None] - torch.tensor([[0], [2]])
    assert torch.equal(pattern.allow(q, q)[1, 0, 2:, 2:], pattern.to_dense(4)[0])
    assert not pattern.allow(q, q)[1, 0, :2].any()
    assert not pattern.allow(q, q)[1, 0, :, :2].any()
    keys = torch.stack([torch.randperm(6) for _ in range(6)]).view(2, 3, 6)
    mask = (pattern & Pattern.stack_heads([pattern, Pattern.causal(), Pattern.window(1)])).allow(q, keys, heads=6)
    assert mask.shape == (2, 6, 6, 6)
    for b in range(2):
        for h in range(6):
            limit = [lambda q, k: True, lambda q, k: True, lambda q, k: q == k][h // 2]
            expected = brute(
                lambda q, k, limit=limit: (k < 2 or q - k < 3) and limit(q, k), q[b].tolist(), keys[b, h // 2].tolist()
            )
            assert torch.equal(mask[b, h], expected)


def test_tables_end_where_they_end():
    full = Pattern.blocks(torch.ones(2, 2, dtype=torch.bool), 3).to_dense(9)[0]
    assert full[:6].tril().sum() == 21
    assert not full[6:].any()
    assert not Pattern.indices(torch.zeros(2, 1, dtype=torch.int64)).to_dense(4)[0, 2:].any()


def test_equality_groups_heads_and_repr_explains():
    pattern = Pattern.sink(16) | Pattern.window(256)
    assert pattern == Pattern.sink(16) | Pattern.window(256)
    assert hash(pattern) == hash(Pattern.sink(16) | Pattern.window(256))
    assert pattern != Pattern.window(256)
    assert Pattern.dense(MASK) != Pattern.dense(MASK.clone())
    assert repr(pattern) == "sink 16 | window 256"
    assert repr(pattern & Pattern.predicate(odd)) == "(sink 16 | window 256) & predicate odd"
    assert repr(~Pattern.window(4)) == "~(window 4)"
    heads = Pattern.stack_heads([pattern, pattern, Pattern.causal()])
    assert repr(heads) == "heads 0-1: sink 16 | window 256; head 2: causal"
    assert Pattern.causal().is_causal
    assert (Pattern.causal() | Pattern.window(3)).is_causal
    assert Pattern.stack_heads([Pattern.causal()] * 2).is_causal
    assert not heads.is_causal


@pytest.mark.parametrize("pair", LEAVES + TWO_SIDED, ids=lambda pair: repr(pair[0]))
def test_block_mask_is_the_same_relation(pair):
    pattern = Pattern.stack_heads([pair[0], ~pair[0]])
    mask = pattern.to_block_mask(LENGTH - 3, LENGTH, heads=4, block_size=4)
    at = [torch.arange(n) for n in (4, LENGTH - 3, LENGTH)]
    seen = mask.mask_mod(torch.tensor(0), at[0][:, None, None], at[1][None, :, None], at[2][None, None])
    dense = pattern.to_dense(LENGTH - 3, LENGTH, heads=4)
    assert torch.equal(seen.expand_as(dense), dense)
    padded = torch.nn.functional.pad(dense, (0, 3, 0, 2)).view(4, 3, 4, 4, 4).any(-1).any(-2)
    assert torch.equal(mask.to_dense()[0].bool(), padded)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Pattern.window(0), "window .* got 0"),
        (lambda: Pattern.window(2, block=0), "blocks .* got 0"),
        (lambda: Pattern.dilated(2, 0), "stride .* got 0"),
        (lambda: Pattern.prefix(-1), "sink .* got -1"),
        (lambda: Pattern.document(INDEX), r"documents .* \[13, 5\]"),
        (lambda: Pattern.document(IDS.float()), "documents must be integers, got torch.float32"),
        (lambda: Pattern.predicate(odd, reach=Reach(0, 1), causal=False), "two-sided predicate"),
        (lambda: Pattern.full().reach(), "full .* later positions"),
        (lambda: Pattern.sink(-1), "sink .* got -1"),
        (lambda: Pattern.blocks(TABLE, 0), "size 0"),
        (lambda: Pattern.blocks(TABLE.float(), 2), "float32"),
        (lambda: Pattern.dense(MASK[0]), r"\[13\]"),
        (lambda: Pattern.indices(MASK), "bool"),
        (lambda: Pattern.predicate(odd, heads=0), "got 0"),
        (lambda: Pattern.predicate(odd, heads=2, reach=[Reach(0, 1)]), "1 reaches .* 2 heads"),
        (lambda: Pattern.predicate(lambda q, k, h: q - k).to_dense(3), "int64"),
        (lambda: Pattern.stack_heads([]), "at least one"),
        (lambda: Pattern.stack_heads([Pattern.blocks(TABLE, 2)]), "entry 0"),
        (lambda: Pattern.blocks(TABLE, 2) & Pattern.predicate(odd, heads=3), "2 and 3 heads"),
        (lambda: Pattern.blocks(TABLE, 2).head(2), "head 2"),
        (lambda: Pattern.blocks(TABLE, 2).to_dense(4, heads=3), "2 heads .* 3 heads"),
        (lambda: Pattern.blocks(TABLE, 2).to_block_mask(4, heads=3), "2 heads .* 3 heads"),
        (lambda: Pattern.blocks(TABLE, 2).allow(torch.arange(3)[None], torch.zeros(1, 3, 4).long()), "2 heads .* 3"),
        (lambda: Pattern.causal().allow(torch.arange(3), torch.arange(3)[None]), r"\[3\]"),
    ],
)
def test_what_was_written_wrong_is_named(build, message):
    with pytest.raises(RegardError, match=message):
        build()

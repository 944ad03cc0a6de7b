"""S2-Attention [172]: the oracles of its sheet."""

import pytest
import torch

import regard
from contracts.decoding import at_once, forced
from contracts.replay import everything_kept
from families import tiny
from lattices import agrees_with_flex, dense, is_covered
from regard import Pattern
from regard.core.placement import Where
from regard.ops.masks import s2

OPTIONS = {
    "block": 4, "local": 2, "stride": 3, "offset": 0, "homogeneous": False, "dense_heads": 0, "holes": "refuse"
}  # fmt: skip


def made(kv_heads: int = 3, heads: int = 6, **more) -> Pattern:
    return s2.allow(Where(0, 1, heads, kv_heads, 8), **OPTIONS | more)


@pytest.mark.parametrize("more", [{}, {"offset": 2}, {"stride": 2, "local": 1}, {"dense_heads": 1, "stride": 5}])
def test_allowed_pairs_equal_a_loop_over_blocks(more):
    options, T = OPTIONS | more, 37
    found = made(**more).to_dense(T, heads=3)
    step = max(1, options["stride"] // 6)
    for h in range(3):
        for i in range(T):
            for j in range(T):
                m, n = i // 4, j // 4
                phase = (n + h * step + options["offset"]) % options["stride"] == 0
                wanted = j <= i and (m - n < options["local"] or phase or h >= 3 - options["dense_heads"])
                assert bool(found[h, i, j]) == wanted
    assert made(**more).density(T, heads=3) == pytest.approx(float(found.sum()) / (3 * T * (T + 1) / 2))


def test_stride_one_and_a_long_window_are_dense():
    assert made(stride=1).is_causal
    dense = Pattern.causal().to_dense(30, heads=3)
    assert torch.equal(made(local=8).to_dense(30, heads=3), dense)


@pytest.mark.parametrize(("kv_heads", "stride"), [(3, 3), (4, 3), (2, 3), (2, 5)])
def test_heads_together_see_everything_exactly_where_phases_reach_every_residue(kv_heads, stride):
    together = made(kv_heads, 2 * kv_heads, stride=stride, holes="leave").to_dense(80, heads=kv_heads).any(0)
    assert torch.equal(together, Pattern.causal().to_dense(80, heads=1)[0]) == (kv_heads >= stride)
    filled = made(kv_heads, 2 * kv_heads, stride=stride, holes="fill").to_dense(80, heads=kv_heads).any(0)
    assert torch.equal(filled, Pattern.causal().to_dense(80, heads=1)[0])


def test_a_block_once_dropped_is_never_needed_again():
    table = made().to_dense(96, heads=3)[:, ::4, ::4]
    below = torch.ones(24, 24).tril(-1).bool()
    assert not (table[:, 1:] & ~table[:, :-1] & below[:-1]).any()


@pytest.mark.parametrize("length", [61, 64, 200])
def test_the_cache_holds_what_the_formula_says_within_a_block(length):
    model = tiny("llama")
    ids = torch.randint(2, 90, (1, length))
    recipe = regard.Recipe([regard.place("s2", block=4, local=2, stride=2)])
    with regard.attach(model, recipe), torch.no_grad():
        cache = model(input_ids=ids[:, :40], use_cache=True).past_key_values
        for token in ids[0, 40:]:
            model(input_ids=token[None, None], past_key_values=cache)
        capacity = cache.layers[1].store.capacity["ragged"]
    wanted = 2 * (2 * 4 + (length - 8) / 2)
    # A block of either head, and the spare slots of a growing buffer.
    assert abs(capacity - wanted) <= 2 * (4 + 4) + 2 * max(48, length // 20)
    assert length < 200 or capacity < 1.8 * length


def test_the_cache_forgets_nothing_that_decoding_needs():
    model = tiny("llama").double()
    ids = torch.randint(2, 90, (1, 90))
    recipe = regard.Recipe([regard.place("s2", block=4, local=2, stride=2)])
    with regard.attach(model, recipe):
        cached = forced(model, ids, torch.ones_like(ids), [50, *range(51, 90)])
    with everything_kept(), regard.attach(model, recipe):
        torch.testing.assert_close(cached, at_once(model, ids, torch.ones_like(ids)), atol=1e-9, rtol=1e-9)


def test_holes_and_too_many_dense_heads_are_named():
    with pytest.raises(regard.RegardError, match="leaves 1 of 3 blocks that no head sees; take a stride up to 2"):
        made(2, 4)
    with pytest.raises(regard.RegardError, match="9 dense heads, this model has 3 KV heads"):
        made(dense_heads=9)


TWO_SIDED = {"block": 4, "local": (2, 1), "stride": 3}


@pytest.mark.parametrize(
    "more", [{}, {"offset": 1}, {"homogeneous": True}, {"stride": 1}, {"local": (1, 3), "stride": 5}]
)
def test_the_bidirectional_form_equals_a_loop_over_blocks(more):
    options, T = TWO_SIDED | more, 43
    pattern = s2.bidirectional(2, **options)
    found = pattern.to_dense(T, heads=2)
    step = 0 if options.get("homogeneous") else max(1, options["stride"] // 2)
    for h in range(2):
        for i in range(T):
            for j in range(T):
                ahead = j // 4 - i // 4
                side = options["local"][1] if ahead > 0 else options["local"][0]
                past = abs(ahead) - (side - 1)
                wanted = past <= 0 or (past + h * step + options.get("offset", 0)) % options["stride"] == 0
                assert bool(found[h, i, j]) == wanted
        for rows, keys in ((4, 4), (8, 4), (5, 7), (16, 32)):
            is_covered(pattern.head(h), T, rows, keys, exact=(rows, keys) == (4, 4))


def test_the_bidirectional_form_at_stride_one_is_full_and_flex_attention_agrees():
    assert dense(s2.bidirectional(1, block=4, local=(1, 1), stride=1), 40).all()
    agrees_with_flex(s2.bidirectional(2, **TWO_SIDED), 48)


def test_numbers_that_do_not_fit_the_bidirectional_form_are_named():
    with pytest.raises(regard.RegardError, match="'s2' needs local of at least 1, got 0"):
        s2.bidirectional(2, local=(0, 1))
    with pytest.raises(regard.RegardError, match="'s2' needs offset of at least 0, got -1"):
        s2.bidirectional(2, offset=-1)

"""Edits of scores and of probabilities, as a layer runs them, against built maps."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.core.slots import Rescore, Reweigh, Slots
from regard.core.step import Step
from regard.ops import layer
from regard.ops.attention import attend
from regard.ops.cache import saw_int4
from regard.primitives.stores import build
from steered import drawn, maps, scores, softmax

N = 24
TABLE = torch.randn(2, 4, N, N, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
DUO = Pattern.stack_heads([Pattern.sink(2) | Pattern.window(5), Pattern.causal()])
CUTS = [(), (9, 10, 17), (5, *range(6, N))]


def told(rows, table=TABLE):
    """Adds what `table [B, H, n, n]` says of each row and key, by arrival."""

    def bias(reading):
        rows, keys = reading.step.arrivals, reading.arrivals
        picked = table[:, :, rows[0]].gather(3, keys.clamp(min=0)[:, :, None].expand(2, 4, rows.shape[1], -1))
        return picked if keys.shape[1] == 4 else picked.expand(2, 4, -1, -1)

    return Rescore("told", lambda step: rows, bias)


def edited(plain, *edits):
    for rows, table in edits:
        plain = plain.clone()
        plain[:, :, rows] += table[:, :, rows]
    return plain


def check(found, want):
    torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("padding", [None, torch.tensor([6, 0])], ids=["whole", "padded"])
def test_biases_add_up_on_the_rows_they_name(cuts, padding, block, monkeypatch):
    monkeypatch.setattr(layer, "ROWS", block)
    q, k = drawn()
    one, two = slice(3, 15), slice(11, None)
    found = maps(q, k, cuts, padding=padding, rescore=(told(one), told(two, -2 * TABLE)))
    check(found, softmax(edited(scores(q, k, padding=padding), (one, TABLE), (two, -2 * TABLE))))


def test_no_row_named_and_no_bias_given_change_no_bit():
    q, k = drawn()
    nothing = Rescore("", lambda step: slice(0, None), lambda reading: None)
    for edit in (told(slice(N, None)), nothing, Rescore("", lambda step: None, nothing.bias)):
        assert torch.equal(maps(q, k, (9,), rescore=(edit,)), maps(q, k, (9,)))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("padding", [None, torch.tensor([6, 0])], ids=["whole", "padded"])
def test_heads_that_hold_different_keys_take_their_own_part_of_a_bias(cuts, padding):
    q, k = drawn()
    rows = slice(8, None)
    found = maps(q, k, cuts, padding=padding, pattern=DUO, rescore=(told(rows),))
    check(found, softmax(edited(scores(q, k, DUO, padding), (rows, TABLE))))


@pytest.mark.parametrize("pattern", [None, DUO], ids=["one list", "split"])
def test_a_reading_of_codes_has_the_scores_of_the_decoded_keys(pattern):
    q, k = drawn()
    codec, _ = saw_int4.encode(Where(0, 1, 4, 2, 8, (0, 1)), **{
        name: option.default for name, option in saw_int4.CARD.options.items()
    })  # fmt: skip
    seen = []

    def bias(reading):
        seen.append((reading.step.arrivals[0], reading.arrivals, reading.scores(), reading.weights()))

    maps(q, k, (9, 17), pattern=pattern, codecs=(codec, codec), rescore=(Rescore("", lambda s: slice(0, None), bias),))
    want = scores(codec.query(q), codec.decode(codec.encode(k), q.dtype), pattern)
    for rows, keys, found, weights in seen:
        at = keys.clamp(min=0)[:, :, None].expand(2, 4, len(rows), -1)
        expected = want[:, :, rows].gather(3, at).masked_fill((keys < 0)[:, :, None], -torch.inf)
        check(found, expected)
        check(weights, softmax(want)[:, :, rows].gather(3, at).masked_fill((keys < 0)[:, :, None], 0))
        if pattern is None:
            check(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("pattern", [None, DUO], ids=["one list", "split"])
def test_segments_are_gained_on_the_rows_they_name(cuts, block, pattern, monkeypatch):
    monkeypatch.setattr(layer, "ROWS", block)
    q, k = drawn()
    rows = slice(5, 19)
    kind = torch.arange(N) % 3

    def split(reading):
        late = reading.step.arrivals[:, None, :, None] >= 10
        return reading.held(kind[None], 0)[:, :, None] * late

    given = torch.tensor([0.5, 2.0, 3.0], dtype=q.dtype)
    edit = Reweigh("", 3, split, lambda mass: given[:, None, None, None].expand_as(mass), lambda step: rows)
    want = softmax(scores(q, k, pattern))
    late = want[:, :, 10:19] * given[kind]
    want = torch.cat((want[:, :, :5], 0.5 * want[:, :, 5:10], late, want[:, :, 19:]), 2)
    check(maps(q, k, cuts, pattern=pattern, reweigh=(edit,)), want)


def test_batch_rows_of_which_a_layer_runs_different_rows_are_told_apart():
    """Row 0 runs arrivals 0, 2 and 4, row 1 runs 1, 3 and 4; from arrival 3 on rows are edited."""
    q, k = drawn(length=3)
    arrivals = torch.tensor([[0, 2, 4], [1, 3, 4]])
    add = Rescore("", lambda step: slice(3, None), lambda reading: TABLE[:, :, : reading.query.shape[2], :3])
    slots = Slots(Pattern.causal(), (None, None), (None, None), rescore=(add,))
    v = torch.eye(3, dtype=q.dtype).expand(2, 2, 3, 3)
    step = Step(0, 5, 2, q.device, rows=arrivals)
    store = build(slots.pattern, (None, None), (None, None), 2, attend, ragged=True)
    found = layer.run(slots, store.append(k, v, step), q, step, {}, scale=1.0)
    plain = scores(q, k)
    plain[0, :, 2] += TABLE[0, :, 1, :3]
    plain[1, :, 1:] += TABLE[1, :, :2, :3]
    check(found, softmax(plain))


def test_the_list_of_a_split_store_is_refused_to_those_who_need_one():
    q, k = drawn()
    store = build(DUO, (None, None), (None, None), 2, attend)
    step = Step(0, N, 2, q.device)
    view = store.append(k, k, step)
    with pytest.raises(RegardError, match="heads hold different keys"):
        view.attend(q, pattern=DUO, step=step, scale=1.0, index=torch.arange(3)[None])

"""DHSA: oracles of the paper's sheet."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import regard
from contracts.decoding import at_once, forced, prompts
from families import tiny
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.core.slots import Reading
from regard.core.step import Step
from regard.ops.sparsity import dhsa
from regard.primitives.chunks import chunk_scores, fill

H, HK, D = 4, 2, 8
CPU = torch.device("cpu")
DEFAULTS = {name: option.default for name, option in dhsa.CARD.options.items()} | {"decode": True}
SMALL = DEFAULTS | {"chunks": "fixed", "budget": 12, "chunk": 4, "block": 4, "first": 0, "last": 4, "dense": 0}


def where(layer=0):
    return Where(layer, 3, H, HK, D, (0, 1))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predictor(seed=0, heads=HK, size=D):
    """Random tensors of the card's shapes, small enough that logits take both signs."""
    sizes = {"kv_heads": heads, "head_dim": size}
    shapes = {n: [sizes.get(a, a) for a in dhsa.CARD.options[n].shape] for n in ("mixer", "shifts", "hidden", "head")}
    made = {n: drawn(*shape, seed=seed + i).float() * 0.3 for i, (n, shape) in enumerate(shapes.items())}
    made["shifts"][4] += 1
    return made


def reading(q, k, step=None, pattern=None, state=None):
    step = step or Step(0, k.shape[2], len(q), CPU)
    positions = step.positions(torch.arange(step.stop))
    return Reading(q, k, positions, pattern or Pattern.causal(), 1.0, None, step, {} if state is None else state)


def lists(options, told, layer=0):
    """Keys read by each row, as sets, one list of rows a batch row; None: all keys."""
    pieces = dhsa.select(where(layer), **options).choose(told)
    if pieces is None:
        return None
    rows = told.query.shape[2]
    found = [[set() for _ in range(rows)] for _ in range(len(told.query))]
    covered = []
    for piece in (one for whole in pieces for one in whole.split(told.key.shape[2] - rows)):
        covered += range(rows)[piece.rows]
        for b, row in enumerate(found):
            own = piece.index[min(b, len(piece.index) - 1)]
            for r in range(rows)[piece.rows]:
                row[r] = set(own[own >= 0].tolist())
    assert covered == list(range(rows))
    return found


def test_a_budget_of_the_whole_length_is_the_models_own_attention_to_the_bit():
    ids, mask = prompts(length=36, padding=0)
    for family in ("llama", "qwen3", "gpt_neox"):
        model = tiny(family)
        own, cached = at_once(model, ids, mask), forced(model, ids, mask, [9, 21, 22])
        options = {"chunks": "fixed", "block": 4, "first": 2, "last": 4, "dense": 0, "chunk": 3}
        with regard.attach(model, [regard.place("dhsa", budget=36, **options)]):
            assert torch.equal(at_once(model, ids, mask), own)
            assert torch.equal(forced(model, ids, mask, [9, 21, 22]), cached)
        with regard.attach(model, [regard.place("dhsa", budget=8, **options)]):
            assert not torch.equal(at_once(model, ids, mask), own)


def test_a_budget_of_window_and_block_is_the_dense_sliding_window():
    ids, mask = prompts(length=36, padding=0)
    model = tiny("mistral")
    options = {"chunks": "fixed", "block": 4, "first": 2, "last": 4, "dense": 0, "chunk": 3}
    own = at_once(model, ids, mask)
    with regard.attach(model, [regard.place("dhsa", budget=8 + 3, **options)]):
        assert torch.equal(at_once(model, ids, mask), own)
    with regard.attach(model, [regard.place("dhsa", budget=8, **options)]):
        assert not torch.equal(at_once(model, ids, mask), own)
    pattern = Pattern.window(10)
    told = reading(drawn(1, H, 32, D), drawn(1, HK, 32, D, seed=1), pattern=pattern)
    # A block of 4 reaches 10 + 3 keys.
    assert lists(SMALL | {"budget": 13}, told) is None
    assert lists(SMALL | {"budget": 12}, told) is not None


def test_fixed_chunks_are_pooled_block_sparse_top_k():
    q, k = drawn(1, H, 40, D), drawn(1, HK, 40, D, seed=1)
    found = lists(SMALL | {"budget": 16}, reading(q, k))[0]
    pooled_q, pooled_k = (x.mean(1)[0].view(10, 4, D).mean(1) for x in (q, k))
    for block in range(10):
        scores = pooled_k[:block] @ pooled_q[block]
        best = {*scores.topk(min(3, block)).indices.tolist(), block}
        want = {key for c in best for key in range(4 * c, 4 * c + 4)}
        for row in range(4 * block, 4 * block + 4):
            # Rows of a block that reaches no more than the budget may read what is masked for them anyway.
            assert {key for key in found[row] if key <= row} == {key for key in want if key <= row}


def test_identical_keys_score_as_the_root_of_their_number():
    key, query = drawn(1, 1, D), drawn(1, 1, D, seed=1)
    cuts = torch.tensor([[0, 1, 5, 14, 30]])
    span = torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 30)
    scores = chunk_scores(query, key.expand(1, 30, D), cuts, *span)[0, 0]
    torch.testing.assert_close(scores, (key * query).sum() * torch.tensor([1.0, 4, 9, 16]).double().sqrt())


@pytest.mark.parametrize("window", [None, 20])
def test_no_list_is_over_budget_or_lacks_forced_keys(window):
    pattern = None if window is None else Pattern.window(window)
    options = SMALL | {"budget": 14, "first": 3, "last": 6, "chunk": 5}
    found = lists(options, reading(drawn(2, H, 61, D), drawn(2, HK, 61, D, seed=1), pattern=pattern))
    for rows in found:
        for start in range(1, 61, 4):
            keys, stop = rows[start], start + 4
            low = 0 if window is None else max(start - window + 1, 0)
            if stop - low <= 14:
                continue
            assert len(keys) == 14
            assert keys >= {*range(low, low + 3), *range(stop - 6, stop)}
            assert min(keys) >= low


def test_the_last_rows_of_the_prompt_and_if_asked_the_response_read_all():
    q, k = drawn(1, H, 40, D), drawn(1, HK, 40, D, seed=1)
    step = Step(0, 40, 1, CPU, prompt=36)
    sparse = lists(SMALL | {"dense": 5}, reading(q, k, step))[0]
    assert [len({key for key in row if key <= r}) for r, row in enumerate(sparse)][31:36] == list(range(32, 37))
    assert [len(row) for row in sparse[36:]] == [12] * 4
    assert len(sparse[30]) == 12
    dense = lists(SMALL | {"decode": False}, reading(q, k, step))[0]
    assert all(set(range(r + 1)) <= dense[r] for r in range(36, 40))


def test_a_block_is_served_by_its_later_queries_and_decoding_by_its_own_alone():
    q, k = drawn(1, H, 40, D), drawn(1, HK, 40, D, seed=1)
    other = q.clone()
    other[:, :, 39] = -50 * q[:, :, 39]
    blocks, changed = (lists(SMALL, reading(x, k))[0] for x in (q, other))
    assert blocks[36] != changed[36]
    assert blocks[:36] == changed[:36]
    step = Step(0, 40, 1, CPU, prompt=20)
    single, changed = (lists(SMALL, reading(x, k, step))[0] for x in (q, other))
    assert single[:39] == changed[:39]


def test_a_needle_is_found_with_a_tenth_of_the_keys():
    total, needle = 1000, 333
    k, q = drawn(1, HK, total, 64), torch.zeros(1, H, 1, 64, dtype=torch.float64)
    q[..., 0] = 1
    k[:, :, needle] = 0
    options = DEFAULTS | {"chunks": "fixed", "budget": 100, "first": 16, "last": 16, "block": 16}
    step = Step(total - 1, 1, 1, CPU, prompt=900)

    def read(strength):
        k[:, :, needle, 0] = strength
        at = Reading(q, k, torch.arange(total)[None], Pattern.causal(), 1.0, None, step, {})
        return dhsa.select(Where(0, 3, H, HK, 64, (0, 1)), **options).choose(at)[0].index.flatten().tolist()

    assert needle in read(16.0)
    assert needle not in read(-16.0)


def test_variable_chunks_recall_more_of_the_best_keys_than_fixed_blocks():
    """Keys constant in pieces of uneven length, a little noise, a query for some of them."""
    total, top = 2048, 256
    found = {"variable": 0.0, "fixed": 0.0}
    for seed in range(5):
        sizes = torch.randint(4, 40, (200,), generator=torch.Generator().manual_seed(seed)).cumsum(0)
        cuts = torch.cat((torch.zeros(1, dtype=torch.long), sizes[sizes < total], torch.tensor([total])))
        pieces = torch.repeat_interleave(cuts.diff())
        k = drawn(len(cuts), 32, seed=seed)[torch.arange(len(cuts) - 1).repeat_interleave(cuts.diff())]
        assert len(pieces) == total
        k = k + 0.1 * drawn(total, 32, seed=seed + 50)
        query = drawn(1, 1, 32, seed=seed + 100)
        best = set((k @ query[0, 0]).topk(top).indices.tolist())
        span = torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), total)
        for name, at in (("variable", cuts), ("fixed", torch.arange(0, total + 1, 16))):
            scores = chunk_scores(query, k[None], at[None], *span)
            ranks = fill(scores, at[None], *span, span[1], budget=top, first=0, last=0)
            found[name] += len(best & set(ranks.flatten().tolist())) / top / 5
    assert found["variable"] > found["fixed"] + 0.05, found


def test_the_predictor_equals_torch_attention_gap_by_gap():
    made, width, side = predictor(), HK * D, dhsa.SIDE
    mixer, shifts = made["mixer"].reshape(4, width, width), made["shifts"].reshape(6, width)
    attention = nn.MultiheadAttention(width, HK, batch_first=True)
    norm = nn.LayerNorm(width)
    with torch.no_grad():
        attention.in_proj_weight.copy_(mixer[:3].flatten(0, 1))
        attention.in_proj_bias.copy_(shifts[:3].flatten())
        attention.out_proj.weight.copy_(mixer[3])
        attention.out_proj.bias.copy_(shifts[3])
        norm.weight.copy_(shifts[4])
        norm.bias.copy_(shifts[5])
        keys, n = drawn(2, 13, width).float(), 13
        real = torch.ones(2, n, dtype=torch.bool)
        real[0, :3] = False
        found = dhsa.gaps(keys, real, tuple(made.values()))
        for row in range(2):
            for gap in range(n):
                at = [t for t in range(gap - side, gap + side) if 0 <= t < n and real[row, t]]
                if not real[row, gap]:
                    continue
                x = keys[row, at][None]
                coded = norm(x + attention(x, x, x)[0])[0]
                left = [coded[i] for i, t in enumerate(at) if t < gap]
                right = [coded[i] for i, t in enumerate(at) if t >= gap]
                a, b = (torch.stack(y).mean(0) if y else torch.zeros(width) for y in (left, right))
                inner = torch.cat((a, b, (a - b).abs(), a * b)) @ made["hidden"].flatten(1).T
                alike = torch.cosine_similarity(a, b, 0)
                inner = (inner + alike * made["head"][:-1, 0] + made["head"][:-1, 1]).relu()
                want = inner @ made["head"][:-1, 2] + made["head"][-1, 2]
                torch.testing.assert_close(found[row, gap], want, atol=1e-4, rtol=1e-4)


PREDICTED = SMALL | {"chunks": "predicted", "spacing": 2, "threshold": 0.0, "block": 2, **predictor()}


def starts(state, options=PREDICTED, cuts=(), total=30, prompt=None):
    """Chunk beginnings after forwards that end at `cuts` and at `total`."""
    q, k, at = drawn(1, H, 40, D), drawn(1, HK, 40, D, seed=1), 0
    for stop in (*cuts, total):
        step = Step(at, stop - at, 1, CPU, prompt=prompt)
        dhsa.select(where(), **options).choose(reading(q[:, :, at:stop], k[:, :, :stop], step, state=state))
        at = stop
    return state["chunks"][0].nonzero()[:, 0].tolist()


def test_predicted_chunks_persist_and_go_on_after_a_crop():
    first = starts({}, total=17)
    assert len(first) > 3
    # The first token begins a chunk whatever stands beside it.
    assert min(b - a for a, b in pairwise(first[1:])) > 2
    whole = starts({}, cuts=[17])
    assert [at for at in whole if at < 17] == first
    assert min(b - a for a, b in pairwise(whole[1:])) > 2
    # Decided again from arrival 17 on, after a forward that is taken back.
    state = {}
    starts(state)
    q, k = drawn(1, H, 40, D), drawn(1, HK, 40, D, seed=1)
    before = state["chunks"][0, :17].clone()
    step = Step(17, 5, 1, CPU)
    dhsa.select(where(), **PREDICTED).choose(reading(q[:, :, 17:22], k[:, :, :22], step, state=state))
    assert state["chunks"].shape == (1, 22)
    assert torch.equal(state["chunks"][0, :17], before)


def test_nothing_of_the_response_is_predicted_and_its_chunks_have_one_length():
    state = {}
    assert starts(state, total=12, prompt=12) == starts({}, cuts=[12, 13], total=20, prompt=12)
    step = Step(12, 10, 1, CPU, prompt=12)
    told = reading(drawn(1, H, 10, D), drawn(1, HK, 40, D, seed=1)[:, :, :22], step, state=state)
    found = dhsa.predicted(told, tuple(predictor().values()), 4, 2, 0, 2, 0.0)
    assert found[0, 12:].nonzero()[:, 0].tolist() == [0, 4, 8]


def test_the_number_of_predicted_chunks_follows_the_length():
    few = starts({}, PREDICTED | {"block": 10, "last": 10, "budget": 12, "spacing": 0}, total=29)
    # Two blocks of ten: 16 chunks besides the first.
    assert len(few) <= 17
    assert len(starts({}, PREDICTED | {"spacing": 0}, total=29)) > len(few) - 1
    assert starts({}, PREDICTED | {"threshold": 100.0}) == [0]


@pytest.mark.parametrize(
    ("share", "predictions", "same"), [("nothing", 3, False), ("chunks", 1, False), ("lists", 1, True)]
)
def test_what_layers_share(share, predictions, same, monkeypatch):
    told, gaps = [], dhsa.gaps
    monkeypatch.setattr(dhsa, "gaps", lambda *given: told.append(1) or gaps(*given))
    step, found = Step(0, 40, 1, CPU), []
    for layer in range(3):
        at = reading(drawn(1, H, 40, D, seed=layer), drawn(1, HK, 40, D, seed=9 + layer), step)
        found.append(lists(PREDICTED | {"share": share}, at, layer))
    assert len(told) == predictions
    assert (found[0] == found[1] == found[2]) is same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 5, "first": 2}, "budget >= first \\+ last = 2 \\+ 4 forced keys, got 5"),
        ({"block": 5}, "last >= block"),
        ({"chunks": "predicted"}, "needs mixer, fitted by regard.calibrate.dhsa; chunks='fixed' needs none"),
        (PREDICTED | predictor(heads=1), r"mixer \[4, 1, 8, 1, 8\], this model needs \[4, 2, 8, 2, 8\]"),
        (PREDICTED | {"head": torch.full((257, 3), float("nan"))}, "head with numbers that are not finite"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(RegardError, match=message):
        dhsa.select(where(), **SMALL | change)
    assert dhsa.select(where(), **SMALL | change | {"budget": None}) is None

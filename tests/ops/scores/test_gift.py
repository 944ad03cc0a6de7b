"""GIFT [009]: gaze shifts and the guidance they give, against the paper's loops over built maps."""

import math

import pytest
import torch
import torch.nn.functional as F

import regard
from contracts.decoding import at_once, forced, prompts
from contracts.subjects import token_map
from families import tiny
from regard.adapters.intercept import intercept
from regard.core.placement import Where
from regard.core.token_map import Kind, Span, TokenMap
from regard.ops.cache import saw_int4
from regard.ops.scores import gift
from steered import drawn, scores, softmax

N, PROMPT, ALPHA = 24, 11, 2.0
OPTIONS = {"alpha": ALPHA, "sources": "0", "first": 1, "last": 2}


def shifted(A, visual, question):
    """Stage 1 of the paper on one row's map `A [H, n, n]`: the gain's logarithm over alpha, by key."""
    H, n = len(A), A.shape[1]
    G = torch.zeros_like(A)
    for q in range(1, n):
        for v in range(n):
            if question[q] and visual[v]:
                G[:, q, v] = (A[:, q, v] - A[:, q - 1, v]).clamp(min=0)
    kept = sorted(range(H), key=lambda h: -float(G[h].sum()))[: H // 2]
    m = torch.stack([G[h].sum(0) for h in kept]).mean(0)[visual]
    m = m.clamp(m.mean() - 3 * m.std(correction=0), m.mean() + 3 * m.std(correction=0))
    told = torch.zeros(n, dtype=A.dtype)
    if m.max() > m.min():
        told[visual] = (m - m.min()) / (m.max() - m.min())
    return told


def guided(a, told, visual, question, alpha=ALPHA):
    """Stage 2 on one row's last attention `a [H, n]`."""
    H, M = len(a), (alpha * told).exp()
    looks = sorted(range(H), key=lambda h: -float(a[h][visual].sum()))[: H // 2]
    hears = sorted(range(H), key=lambda h: -float(a[h][question].sum()))[: H // 2]
    before = sum(float(a[h][visual].sum()) for h in looks)
    s = sum(float((a[h] * M)[visual].sum()) for h in looks) / before
    out = a.clone()
    for h in looks:
        out[h][visual] = (a[h] * M)[visual]
    for h in hears:
        out[h][question] = s * a[h][question]
    return out / out.sum(-1, keepdim=True)


def told_of(tokens, row, n):
    kinds = tokens.at(torch.arange(n)[None])[min(row, tokens.rows - 1)]
    return kinds == Kind.VISUAL, kinds == Kind.QUERY


def eager(model, ids, mask, read=lambda layer, head, k: k, value=lambda layer, head, v: v, see=None, alpha=ALPHA):
    """The definition: one dense forward in which layers 1 and 2 follow the paper's loops, rows PROMPT - 1 and later."""
    tokens = token_map(len(ids))
    n, found = ids.shape[1], {}

    def run(call):
        q, group = call.query, call.query.shape[1] // call.key.shape[1]
        k, v = (
            torch.stack([f(call.seat.layer, h, x[:, h]) for h in range(x.shape[1])], 1).repeat_interleave(group, 1)
            for f, x in ((read, call.key), (value, call.value))
        )
        seen = torch.ones(n, n, dtype=torch.bool).tril().expand(q.shape[1], -1, -1) if see is None else see(call, n)
        A = (q @ k.transpose(-1, -2) * call.scale).masked_fill(~seen, -torch.inf).softmax(-1)
        for row in range(len(q)):
            visual, question = told_of(tokens, row, n)
            if call.seat.layer == 0:
                found[row] = shifted(A[row, :, :PROMPT, :PROMPT], visual[:PROMPT], question[:PROMPT])
                continue
            told = F.pad(found[row], (0, n - PROMPT))
            for i in range(PROMPT - 1, n):
                A[row, :, i] = guided(A[row, :, i], told, visual, question, alpha)
        return A @ v

    with torch.no_grad(), intercept(model, run):
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


CODES = {"key_bits": 4, "value_bits": 4}
GATES = torch.tensor([[0.9, 0.1], [0.5, 0.6], [0.0, 1.0]])


def encoded(which):
    """Keys or values `[B, n, D]` as `saw_int4` gives them back, in their own basis."""
    options = {name: option.default for name, option in saw_int4.CARD.options.items()} | CODES
    codec = saw_int4.encode(Where(0, 3, 4, 2, 8, (0, 1)), **options)[which]

    def f(layer, head, x):
        read = codec.decode(codec.encode(x[:, None]), x.dtype)
        return codec.output(read)[:, 0]

    return f


def held(call, n):
    """What Duo's heads see: those of larger gates all, the others 2 sinks and 5 recent."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    full = (j <= i).expand(2, -1, -1).clone()
    retrieval = GATES.flatten().argsort(descending=True)[:3].tolist()
    for head in range(2):
        if call.seat.layer * 2 + head not in retrieval:
            full[head] &= (i - j < 5) | (j < 2)
    return full.repeat_interleave(2, 0)


@pytest.mark.parametrize("under", ["nothing", "saw_int4", "duo"])
def test_a_model_under_gift_is_the_papers_loops_over_what_its_cache_holds(under):
    model = tiny("llama").double()
    ids, mask = prompts(length=20, padding=0)
    placed = {
        "nothing": [],
        "saw_int4": [regard.place("saw_int4", **CODES)],
        "duo": [regard.place("duo", gates=GATES, sparsity=0.5, sink=2, recent=5)],
    }[under]
    more = {"saw_int4": {"read": encoded(0), "value": encoded(1)}, "duo": {"see": held}}.get(under, {})
    want, plain = (eager(model, ids, mask, alpha=alpha, **more) for alpha in (ALPHA, 0.0))
    assert not torch.allclose(want, plain, atol=1e-3)
    with regard.attach(model, [*placed, regard.place("gift", **OPTIONS)]) as handle, handle.reading(token_map(2)):
        for cuts in ([PROMPT, 12, 15], [3, 9, 10, *range(PROMPT, 20)], []):
            with handle.prompting(PROMPT):
                torch.testing.assert_close(forced(model, ids, mask, cuts), want, atol=1e-9, rtol=1e-9)


def test_guidance_is_an_additive_mask_of_torchs_own_attention():
    q, k = drawn(batch=1, kv_heads=4)
    plain = softmax(scores(q, k))
    visual, question = (torch.arange(N) >= 3) & (torch.arange(N) < 9), (torch.arange(N) >= 10) & (torch.arange(N) < 16)
    told = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=q.dtype)
    bias = gift.guide(plain[:, :, -1:], (3 * told)[None, None, None], visual.view(1, 1, 1, -1), question)
    want = guided(plain[0, :, -1], told, visual, question, 3.0)
    eye = torch.eye(N, dtype=q.dtype).expand(1, 4, N, N)
    found = F.scaled_dot_product_attention(q[:, :, -1:], k, eye, attn_mask=bias, scale=1.0)
    torch.testing.assert_close(found[0, :, 0], want)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_what_is_looked_at_evenly_has_no_rise_and_an_object_beats_a_sink():
    """A sink at 0.5 in every row of the question; an object that rises from 0.05 to 0.3."""
    rows = 6
    A = torch.full((1, 2, rows, 4), 0.02, dtype=torch.float64)
    A[..., 1] = 0.5
    A[..., 2] = torch.linspace(0.05, 0.3, rows)
    found = gift.rises(A[:, :, 1:], A[:, :, :1]).sum(2)
    assert not found[..., [0, 1, 3]].any()
    told = gift.normalised(gift.shift(found, torch.ones(1, 4, dtype=torch.bool)), torch.ones(1, 4, dtype=torch.bool))
    gain = (5 * told).exp()[0]
    assert math.isclose(gain[1], 1)
    assert gain[2] > 10 * gain[1]
    level = gift.rises((A + 0.1)[:, :, 1:], (A + 0.1)[:, :, :1]).sum(2)
    torch.testing.assert_close(level, found)
    flat = gift.normalised(torch.full((1, 4), 0.3), torch.ones(1, 4, dtype=torch.bool))
    assert not flat.any()


def test_marks_say_which_words_count_and_no_question_changes_nothing():
    model = tiny("llama").double()
    ids, mask = prompts(length=20, padding=0)
    silent = TokenMap.of_text(mask[:, :PROMPT], [Span(0, 2, PROMPT), Span(1, 2, PROMPT)])
    silent.kinds[:, 1] = Kind.TEMPLATE
    marks = torch.zeros(1, PROMPT, dtype=torch.bool)
    marks[0, 8] = True
    with torch.no_grad():
        plain = at_once(model, ids, mask)
    with regard.attach(model, [regard.place("gift", **OPTIONS)]) as handle, handle.prompting(PROMPT):
        with handle.reading(silent):
            torch.testing.assert_close(at_once(model, ids, mask), plain)
        with handle.reading(token_map(2)):
            every = at_once(model, ids, mask)
            with handle.marking(marks):
                some = forced(model, ids, mask, [9, 10])
                torch.testing.assert_close(some, at_once(model, ids, mask))
    assert not torch.allclose(every, some, atol=1e-4)


def test_a_crop_into_the_question_is_refused_and_one_behind_it_is_not():
    model = tiny("llama")
    ids, _ = prompts(length=20, padding=0)
    handle = regard.attach(model, [regard.place("gift", **OPTIONS)])
    with handle, handle.reading(token_map(2)), handle.prompting(PROMPT), torch.no_grad():
        cache = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
        once = model(input_ids=ids[:, PROMPT:], past_key_values=cache).logits
        cache.crop(-(20 - PROMPT))
        torch.testing.assert_close(model(input_ids=ids[:, PROMPT:], past_key_values=cache).logits, once)
        cache.crop(-(20 - PROMPT + 1))
        with pytest.raises(regard.RegardError, match="left 10 of the 11 prompt rows in which 'gift'"):
            model(input_ids=ids[:, 10:], past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sources": "2"}, "first must be 3 or more|edits layers 3 to"),
        ({"sources": "1", "first": 1}, "first must be 2 or more"),
        ({"sources": "0", "last": 3}, "edits layers 1 to 3, this model has layers 0 to 2"),
        ({"sources": "x"}, "needs sources such as '10,11', layers of 0 to 2; got 'x'"),
        ({"sources": "3"}, "layers of 0 to 2; got '3'"),
        ({"alpha": -1.0}, "'alpha' of 'gift'"),
    ],
)
def test_options_that_cannot_be_are_named(options, words):
    with pytest.raises(regard.RegardError, match=words):
        regard.attach(tiny("llama"), [regard.place("gift", **options)])


def test_a_request_without_an_image_is_refused_before_it_runs():
    model, (ids, mask) = tiny("llama"), prompts(padding=0)
    with regard.attach(model, [regard.place("gift", **OPTIONS)]) as handle:
        with pytest.raises(regard.RegardError, match="'gift' needs to know what the tokens are"):
            at_once(model, ids, mask)
        with handle.reading(TokenMap.of_text(mask)), pytest.raises(regard.RegardError, match="'gift' needs visual"):
            at_once(model, ids, mask)

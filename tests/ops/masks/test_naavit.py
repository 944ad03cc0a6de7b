"""No attention among visual tokens [053]: the oracles of its sheet."""

import pytest
import torch
import torch.nn.functional as F

import regard
from lattices import agrees_with_flex, dense, is_covered
from regard import Pattern
from regard.ops.masks import naavit

SPANS = [(3, 8), (11, 14)]
VISUAL = [any(a <= i < b for a, b in SPANS) for i in range(20)]


@pytest.mark.parametrize("rows", ["none", "text", "self"])
def test_pairs_equal_a_loop(rows):
    pattern = naavit.pattern(SPANS, rows=rows)
    found = dense(pattern, 20)
    for i in range(20):
        for j in range(20):
            wanted = j <= i
            if VISUAL[i]:
                wanted = wanted and {"none": False, "text": not VISUAL[j], "self": not VISUAL[j] or i == j}[rows]
            assert bool(found[i, j]) == wanted
    for sizes in ((4, 4), (3, 5)):
        is_covered(pattern, 20, *sizes)


def test_text_rows_equal_torch_with_an_explicit_mask_and_do_not_read_ahead():
    q, k, v = torch.randn(3, 1, 2, 20, 8, dtype=torch.float64).unbind(0)
    text = [i for i in range(20) if not VISUAL[i]]
    out, lse = regard.attend(q, k, v, pattern=naavit.pattern(SPANS))
    mask = torch.tensor([[j <= i for j in range(20)] for i in text])
    wanted = F.scaled_dot_product_attention(q[:, :, text], k, v, attn_mask=mask)
    torch.testing.assert_close(out[:, :, text], wanted, atol=1e-12, rtol=0)
    assert (lse[:, :, 3:8] == -torch.inf).all()
    assert (out[:, :, 3:8] == 0).all()
    changed = v.clone()
    changed[:, :, 3:8] += 1
    other = regard.attend(q, k, changed, pattern=naavit.pattern(SPANS))[0]
    assert torch.equal(other[:, :, :3], out[:, :, :3])


def test_without_visual_tokens_it_is_causal():
    assert naavit.pattern([]).is_causal
    assert torch.equal(dense(naavit.pattern([(4, 4)]), 9), dense(Pattern.causal(), 9))


def test_flex_attention_agrees():
    agrees_with_flex(naavit.pattern(SPANS, rows="self"), 20)


def test_spans_from_flags():
    flags = torch.tensor(VISUAL)
    assert naavit.visual_spans(flags, images=2) == tuple(SPANS)
    assert naavit.visual_spans(flags[:0], images=0) == ()
    with pytest.raises(regard.RegardError, match=r"1 images expected, but visual tokens form 2 runs"):
        naavit.visual_spans(flags)


@pytest.mark.parametrize(
    ("words", "spans"),
    [(r"spans \(3, 8\) and \(7, 9\) of visual tokens overlap", [(7, 9), (3, 8)]),
     (r"needs 0 <= start <= stop, got \(5, 3\)", [(5, 3)]), (r"got \(-2, 3\); positions count from", [(-2, 3)]),
     (r"is \(start, stop\) in whole numbers", [(1, 2, 3)])],
)  # fmt: skip
def test_spans_that_do_not_fit_are_named(words, spans):
    with pytest.raises(regard.RegardError, match=words):
        naavit.pattern(spans)
    with pytest.raises(regard.RegardError, match="rows of 'naavit' must be one of none, text, self, got 'all'"):
        naavit.pattern(SPANS, rows="all")

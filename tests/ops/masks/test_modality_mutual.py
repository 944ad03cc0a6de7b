"""Images read their question [093]: the oracles of its sheet."""

import pytest
import torch
import torch.nn.functional as F

import regard
from families import tiny
from lattices import agrees_with_flex, decoded, dense, is_covered, logits
from regard import Pattern
from regard.ops.masks import modality_mutual as mma

TURNS = [((2, 6), (7, 11)), ((13, 16), (16, 18))]
V, Q = mma.IMAGE, mma.QUESTION


def inside(i, span):
    return span[0] <= i < span[1]


def test_pairs_equal_a_loop():
    pattern = mma.pattern(TURNS)
    found = dense(pattern, 24)
    for i in range(24):
        for j in range(24):
            reads = any(inside(i, image) and inside(j, question) for image, question in TURNS)
            assert bool(found[i, j]) == (j <= i or reads)
    for sizes in ((4, 4), (3, 5), (1, 1)):
        is_covered(pattern, 24, *sizes, exact=sizes == (1, 1))


def test_an_empty_question_is_causal():
    assert mma.pattern([]).is_causal
    assert torch.equal(dense(mma.pattern([((2, 6), (6, 6))]), 12), dense(Pattern.causal(), 12))


def test_columns_of_the_question_are_a_prefix_but_for_its_own_rows():
    found, prefix = (dense(p, 14) for p in (mma.pattern([((0, 5), (5, 9))]), Pattern.prefix(9)))
    causal = dense(Pattern.causal(), 14)
    assert torch.equal(found[:5, 5:], prefix[:5, 5:])
    assert torch.equal(found[5:], causal[5:])
    assert torch.equal(found[:5, :5], causal[:5, :5])


def test_torch_and_flex_attention_agree():
    q, k, v = torch.randn(3, 1, 2, 24, 8, dtype=torch.float64).unbind(0)
    out = regard.attend(q, k, v, pattern=mma.pattern(TURNS))[0]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=dense(mma.pattern(TURNS), 24))
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
    agrees_with_flex(mma.pattern(TURNS), 24)


def test_the_question_reaches_the_image_at_once_and_itself_one_layer_later():
    torch.manual_seed(0)
    pattern = mma.pattern([((2, 6), (6, 10))])
    x = torch.randn(1, 1, 14, 8, dtype=torch.float64)
    other = x.clone()
    other[:, :, 9] += 1

    def layers(x):
        first = regard.attend(x, x, x, pattern=pattern)[0]
        return first, regard.attend(first, first, first, pattern=pattern)[0]

    changed = [(a - b).abs().amax((0, 1, 3)) > 0 for a, b in zip(layers(x), layers(other), strict=True)]
    assert changed[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5, 9, 10, 11, 12, 13]
    assert changed[1].nonzero()[:, 0].tolist() == list(range(2, 14))
    causal = regard.attend(x, x, x)[0]
    torch.testing.assert_close(layers(x)[0][:, :, 6:], causal[:, :, 6:], atol=1e-12, rtol=0)


def test_a_llama_decodes_as_one_masked_forward():
    model, ids = tiny("llama").double(), torch.randint(2, 90, (1, 24))
    pattern, at = mma.pattern(TURNS), torch.arange(24)
    found = decoded(model, ids, 18, pattern, at)
    torch.testing.assert_close(found, logits(model, ids, pattern, at), atol=1e-9, rtol=0)


def test_turns_from_types_do_not_count_padding():
    types = torch.tensor([[0, 0, V, V, 0, Q, Q, 0], [0, V, V, 0, Q, Q, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]]).bool()
    assert mma.turns(types, mask) == (((1, 3), (4, 6)),)
    assert mma.turns(types[:1]) == (((2, 4), (5, 7)),)
    assert mma.turns(torch.zeros(2, 5).long()) == ()
    with pytest.raises(regard.RegardError, match="rows 0 and 1 have turns"):
        mma.turns(types)


@pytest.mark.parametrize("types", [[Q, Q, V, V, 0], [V, 0, V, Q, Q]])
def test_an_image_without_a_question_is_named(types):
    with pytest.raises(regard.RegardError, match="row 0: no question stands behind the image at"):
        mma.turns(torch.tensor([types]))


def test_a_loss_on_what_the_image_read_is_refused():
    labels = torch.full((2, 24), -100)
    labels[:, 19:] = 5
    mma.check_labels(labels, TURNS)
    labels[1, 17] = 5
    with pytest.raises(regard.RegardError, match=r"row 1 has a loss on position 17 of the question \(16, 18\)"):
        mma.check_labels(labels, TURNS)
    labels[1, 18:20] = -100
    mask = torch.ones(2, 24).bool()
    mask[1, :2] = False  # the row's position 17 is now an answer, its position 15 an image
    mma.check_labels(labels, TURNS, mask)


@pytest.mark.parametrize(
    ("words", "turns"),
    [(r"the question \(1, 3\) does not stand behind its image \(4, 6\)", [((4, 6), (1, 3))]),
     (r"spans \(2, 6\) and \(5, 8\) of images and questions overlap", [((2, 6), (5, 8))]),
     (r"got \(-1, 2\)", [((-1, 2), (5, 8))])],
)  # fmt: skip
def test_turns_that_do_not_fit_are_named(words, turns):
    with pytest.raises(regard.RegardError, match=words):
        mma.pattern(turns)

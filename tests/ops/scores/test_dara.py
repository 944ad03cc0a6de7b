"""DARA [097]: factors on the scores of each image's keys."""

import pytest
import torch

import regard
from contracts.decoding import at_once, prompts
from families import tiny
from regard.core.placement import Where
from regard.core.token_map import Span, TokenMap
from regard.ops.scores import dara
from steered import drawn, maps, scores, softmax

WHERE = Where(0, 2, 4, 2, 8, (0, 1))
N = 24
SPANS = (Span(0, 2, 6), Span(0, 9, 12), Span(1, 5, 9))
MAP = TokenMap.of_text(torch.ones(2, N), SPANS)
FACTORS = 0.5 + torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(**more):
    return dara.rescore(WHERE, **{"factors": FACTORS, "mode": "scale", "share": False} | more)


@pytest.mark.parametrize("mode", ["scale", "add"])
@pytest.mark.parametrize("cuts", [(), (4, 10, 11, 20)])
def test_an_image_has_its_keys_scaled_or_a_mask_added(mode, cuts):
    q, k = drawn()
    plain = scores(q, k)
    for h in range(4):
        for span, image in zip(SPANS, (0, 1, 0), strict=True):
            own = plain[span.row, h, :, span.start : span.stop]
            if mode == "scale":
                scaled = q[span.row, h] @ (FACTORS[0, h, image] * k[span.row, h // 2, span.start : span.stop]).T
                own.copy_(torch.where(own == -torch.inf, own, scaled))
            else:
                own += FACTORS[0, h, image]
    found = maps(q, k, cuts, tokens=MAP, rescore=(made(mode=mode),))
    torch.testing.assert_close(found, softmax(plain), atol=1e-12, rtol=1e-9)


def test_tiles_of_one_image_share_its_factor():
    q, k = drawn()
    tiles = TokenMap(MAP.kinds, (Span(0, 2, 4, image=0), Span(0, 4, 6, image=0), Span(0, 9, 12, image=1), SPANS[2]))
    assert torch.equal(maps(q, k, tokens=tiles, rescore=(made(),)), maps(q, k, tokens=MAP, rescore=(made(),)))


def test_no_image_changes_nothing_and_identity_is_neutral():
    q, k = drawn()
    text = TokenMap.of_text(torch.ones(2, N))
    assert torch.equal(maps(q, k, tokens=text, rescore=(made(),)), maps(q, k))
    assert made(factors=torch.ones(2, 4, 2)) is None
    assert made(factors=torch.zeros(2, 4, 2), mode="add") is None


def test_more_images_than_factors_are_refused_or_share_the_last():
    q, k = drawn()
    one = FACTORS[..., :1]
    with pytest.raises(regard.RegardError, match="factors for 1 images, and a row of the token map has 2"):
        maps(q, k, tokens=MAP, rescore=(made(factors=one),))
    shared = maps(q, k, tokens=MAP, rescore=(made(factors=one, share=True),))
    same = maps(q, k, tokens=MAP, rescore=(made(factors=one.expand(-1, -1, 2)),))
    assert torch.equal(shared, same)


@pytest.mark.parametrize("mode", ["scale", "add"])
def test_gradients_of_factors_are_right_and_reach_them_through_a_model(mode):
    s = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = torch.tensor([[[-1, 0, 1, 1]]])
    factors = FACTORS[0, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: (s + dara.balance(s, images, f, mode)).softmax(-1), factors)
    model, (ids, mask) = tiny("llama"), prompts(padding=0)
    trained = torch.ones(3, 4, 2, requires_grad=True)
    tokens = TokenMap.of_text(mask, (Span(0, 2, 6), Span(1, 5, 9)))
    with regard.attach(model, [regard.place("dara", layers=(0,), factors=trained)]) as handle, handle.reading(tokens):
        model(input_ids=ids, labels=ids).loss.backward()
    assert trained.grad[0, :, 0].abs().min() > 0
    assert not trained.grad[1:].any()
    assert not trained.grad[:, :, 1].any()


def test_bad_factors_and_a_missing_map_are_named():
    with pytest.raises(regard.RegardError, match=r"\[layers, heads, images\] = \[2, 4, 1 or more\], got \[2, 3, 2\]"):
        made(factors=torch.ones(2, 3, 2))
    with pytest.raises(regard.RegardError, match=r"needs factors \[layers, heads, images\]; fit some"):
        made(factors=None)
    with pytest.raises(regard.RegardError, match="not finite"):
        made(factors=torch.full((2, 4, 1), torch.nan))
    model, (ids, mask) = tiny("llama"), prompts()
    told = pytest.raises(regard.RegardError, match="'dara' needs to know what the tokens are")
    with regard.attach(model, [regard.place("dara", factors=torch.rand(3, 4, 2))]), told:
        at_once(model, ids, mask)

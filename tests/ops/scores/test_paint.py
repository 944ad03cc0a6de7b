"""PAINT [114]: margins on two sets of image tokens, and the sets from an encoder."""

import pytest
import torch

import regard
import vlms
from contracts.decoding import at_once, prompts
from families import tiny
from regard.core.placement import Where
from regard.core.token_map import Span, TokenMap
from regard.models import vlm
from regard.ops.scores import paint
from steered import drawn, maps, scores, softmax

WHERE = Where(2, 4, 4, 2, 8, (0, 1))
N, PROMPT = 24, 18
BARE = TokenMap.of_text(torch.ones(2, N), (Span(0, 2, 10), Span(1, 4, 12)))
LOCAL, SUMMARY = torch.arange(8) < 3, torch.arange(8) == 5
MAP = paint.marked(BARE, LOCAL, SUMMARY)


def made(alpha=0.7, beta=0.3, by_head=False, where=WHERE):
    return paint.rescore(where, alpha=alpha, beta=beta, by_head=by_head)


def run(edit, cuts=(), shift=0.0):
    q, k = drawn()
    if shift:
        q, k = torch.nn.functional.pad(q, (0, 1), value=1.0), torch.nn.functional.pad(k, (0, 1), value=shift)
    return maps(q, k, cuts, prompt=PROMPT, tokens=MAP, rescore=() if edit is None else (edit,))


def loop(plain, alpha, beta, shares=None):
    found = plain.clone()
    for b, start in enumerate((2, 4)):
        for h in range(4):
            for i in range(PROMPT - 1, N):
                for j in range(start, start + 8):
                    gamma = alpha if LOCAL[j - start] else beta if SUMMARY[j - start] else 0
                    gamma *= 1 if shares is None else float(shares[b, h, i])
                    found[b, h, i, j] += gamma * abs(float(plain[b, h, i, j]))
    return softmax(found)


@pytest.mark.parametrize("cuts", [(), (5, 17, 20)])
def test_scores_of_two_sets_rise_by_their_margins(cuts):
    plain = scores(*drawn())
    found = run(made(), cuts)
    torch.testing.assert_close(found, loop(plain, 0.7, 0.3), atol=1e-12, rtol=1e-9)
    image = torch.stack([BARE.kinds[b] == 3 for b in range(2)])[:, None, None]
    mass = (softmax(plain) * image).sum(-1)
    by_head = run(made(by_head=True), cuts)
    torch.testing.assert_close(by_head, loop(plain, 0.7, 0.3, mass / mass.mean(1, keepdim=True)))


def test_the_margin_is_not_invariant_to_a_constant():
    """|S| sees what softmax does not: the paper's formula, kept as it is."""
    torch.testing.assert_close(run(None, shift=3.0), run(None))
    assert not torch.allclose(run(made(), shift=3.0), run(made()), atol=1e-3)


def test_image_mass_grows_with_the_margin_and_no_other_key_gains():
    image = torch.stack([BARE.kinds[b] == 3 for b in range(2)])[:, None, None]
    chosen = torch.stack([MAP.sets["local"][b] | MAP.sets["summary"][b] for b in range(2)])[:, None, None]
    before = run(None)
    for gamma in (0.3, 0.6, 1.2):
        after = run(made(gamma, gamma))
        torch.testing.assert_close(after.sum(-1), torch.ones_like(after[..., 0]))
        rows = slice(PROMPT - 1, None)
        assert ((after * image).sum(-1) > (before * image).sum(-1))[:, :, rows].all()
        assert torch.equal(after[:, :, : PROMPT - 1], before[:, :, : PROMPT - 1])
        assert (after <= before + 1e-12)[~chosen.expand_as(after)].all()
        before = after


def test_planted_outliers_are_the_summary_and_the_sets_are_apart():
    g = torch.Generator().manual_seed(0)
    early, late = (torch.rand(2, 3, 65, 65, generator=g) for _ in range(2))
    late[:, :, 0, 1:] = 0.5 + 0.01 * late[:, :, 0, 1:]
    late[:, :, 0, [8, 20]] = 5.0
    early[:, :, 0, 8] = 9.0
    local, summary = paint.sets(early, late, 64)
    assert summary[0].nonzero()[:, 0].tolist() == summary[1].nonzero()[:, 0].tolist() == [7, 19]
    assert not (local & summary).any()
    best = early[:, :, 0, 1:].sum(1).topk(16).indices
    assert all(set(local[b].nonzero()[:, 0].tolist()) == set(best[b].tolist()) - {7, 19} for b in range(2))


def test_the_sets_are_told_from_the_model_s_own_encoder():
    pytest.importorskip("PIL")
    model, _ = vlm.build(["yes"])
    patches = (vlm.SIDE // vlm.PATCH) ** 2
    pixels = torch.randn(2, 3, vlm.SIDE, vlm.SIDE, generator=torch.Generator().manual_seed(0))
    bare = TokenMap.of_text(torch.ones(2, patches + 3), (Span(0, 1, patches + 1), Span(1, 2, patches + 2)))
    found = paint.tell(model, {"pixel_values": pixels}, bare)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = tower(pixels, output_attentions=True).attentions
    wanted = paint.marked(bare, *paint.sets(seen[0], seen[-2], patches))
    assert wanted.sets["local"].any()
    assert all(torch.equal(found.sets[name], wanted.sets[name]) for name in ("local", "summary"))
    assert paint.tell(model, {}, bare) is bare
    with pytest.raises(regard.RegardError, match="not one for each of 2 spans; say them yourself"):
        paint.tell(model, {"pixel_values": pixels[:1]}, bare)
    with pytest.raises(regard.RegardError, match="that of LlavaForConditionalGeneration has one layer"):
        paint.tell(vlms.tiny("llava")[0], {"pixel_values": pixels}, bare)
    with pytest.raises(regard.RegardError, match="the image encoder of Qwen2_5_VLForConditionalGeneration has none"):
        paint.tell(vlms.tiny("qwen2_5_vl")[0], {"pixel_values": pixels}, bare)


def test_encoders_and_sets_that_do_not_fit_are_named():
    with pytest.raises(regard.RegardError, match="an encoder with a CLS token, 64 patches and 65 tokens; early is"):
        paint.sets(torch.rand(2, 64, 64), torch.rand(2, 64, 64), 64)
    with pytest.raises(regard.RegardError, match="8 patches or more, got 4"):
        paint.sets(torch.rand(2, 5, 5), torch.rand(2, 5, 5), 4)
    with pytest.raises(regard.RegardError, match="of 6 patches, and Span"):
        paint.marked(BARE, torch.ones(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool))
    with pytest.raises(regard.RegardError, match="'alpha' of 'paint'"):
        regard.attach(tiny("llama"), [regard.place("paint", alpha=-1.0)])
    model, (ids, mask) = tiny("llama"), prompts(padding=0)
    with regard.attach(model, [regard.place("paint")]) as handle:
        for tokens, words in (
            (TokenMap.of_text(mask), "'paint' needs visual tokens, and the token map has none in rows 0, 1"),
            (TokenMap.of_text(mask, BARE.spans), "'paint' needs a token map with a set 'local'; this one has none"),
        ):
            with handle.reading(tokens), pytest.raises(regard.RegardError, match=words):
                at_once(model, ids, mask)

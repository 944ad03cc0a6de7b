"""Occlusion on a linear decoder where the answer is known, on tiny models, and correlations by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import regard
from families import tiny
from regard.measure import explanation

T, S, V = 5, 12, 7


def linear(attention, x):
    """Log-probabilities of a decoder that adds up what its cross-attention reads."""
    return lambda given: (attention @ given).log_softmax(-1)


def made(seed=0):
    at = torch.Generator().manual_seed(seed)
    read = torch.randperm(S, generator=at)[:T]
    return F.one_hot(read, S).double(), 3 * torch.randn(S, V, generator=at, dtype=torch.float64)


def test_saliency_in_a_loop_and_in_any_batch():
    attention, x = torch.rand(T, S, dtype=torch.float64).softmax(-1), torch.randn(S, V, dtype=torch.float64)
    segments, chosen = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 1, 0, 4, 4]), explanation.masks(40, 6)
    chosen[:, 4] = False
    score, plain = linear(attention, x), (attention @ x).softmax(-1)
    expected = torch.zeros(T, S, dtype=torch.float64)
    for cell, segment in enumerate(segments.tolist()):
        hit = [mask for mask in chosen if mask[segment]]
        for mask in hit:
            masked = (attention @ (x * ~mask[segments][:, None])).log_softmax(-1)
            expected[:, cell] += F.kl_div(masked, plain, reduction="none").sum(-1) / len(hit)
    for batch in (1, 7, 64):
        torch.testing.assert_close(explanation.saliency(score, x, segments, chosen, batch), expected)
    assert expected[:, 10:].eq(0).all()
    assert (expected >= 0).all()


def test_one_hot_attention_is_its_saliency():
    attention, x = made()
    found = explanation.saliency(linear(attention, x), x, torch.arange(S), explanation.masks(2000, S))
    assert explanation.agreement(found, attention[None, None]).both > 0.95
    again = explanation.saliency(linear(attention, x), x, torch.arange(S), explanation.masks(2000, S, seed=1))
    assert float(explanation.correlation(found, again).min()) > 0.9


def test_a_frame_that_is_never_read_is_worth_nothing():
    """Where frames are occluded one by one; among random masks it has the mean divergence, as others are out too."""
    attention, x = made()
    found = explanation.saliency(linear(attention, x), x, torch.arange(S), torch.eye(S, dtype=torch.bool))
    assert found[attention == 0].eq(0).all()
    assert (found[attention == 1] > 0).all()


def test_correlations():
    at = torch.Generator().manual_seed(0)
    relevance = torch.rand(T, 2 * S, generator=at, dtype=torch.float64)
    pooled = relevance.view(T, S, 2).mean(-1)
    same = (pooled * torch.rand(T, 1, generator=at) + 3)[None, None].expand(2, 3, -1, -1)
    found = explanation.agreement(relevance, same)
    torch.testing.assert_close(found.heads, torch.ones(2, 3).double())
    assert found.both == pytest.approx(1)
    shuffled = torch.stack([pooled[:, torch.randperm(S, generator=at)] for _ in range(400)])[None]
    assert abs(float(explanation.agreement(relevance, shuffled).heads.mean())) < 0.03
    maps = torch.rand(2, 3, T, S, generator=at, dtype=torch.float64)
    by_hand = torch.stack([torch.corrcoef(torch.stack([pooled[t], maps[:, 1].mean(0)[t]]))[0, 1] for t in range(T)])
    assert float(explanation.agreement(relevance, maps).columns[1]) == pytest.approx(float(by_hand.mean()))


def test_constant_rows_are_skipped_and_counted():
    relevance, maps = torch.rand(T, S, dtype=torch.float64), torch.rand(1, 2, T, S, dtype=torch.float64)
    maps[0, 1, 2] = 1 / S
    found = explanation.agreement(relevance, maps)
    rest = [t for t in range(T) if t != 2]
    assert found.skipped == 1
    torch.testing.assert_close(found.heads[0, 1], explanation.correlation(relevance, maps[0, 1])[rest].mean())


def test_deletion_takes_the_most_relevant_first():
    x = torch.tensor([4.0, 1.0, 3.0, 2.0])
    curve, area = explanation.deletion(lambda given: given.sum(1), x, x, step=0.25)
    assert curve.tolist() == [10, 6, 3, 1, 0]
    assert area == pytest.approx((10 / 2 + 6 + 3 + 1) / 4)
    assert explanation.deletion(lambda given: given.sum(1), x, -x, step=0.25)[1] > area


def test_tiles():
    assert explanation.tiles((3, 5), (2, 3)).tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [2, 2, 2, 3, 3]]


def bart(seed=0):
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "dropout": 0.0}
    config = tf.BartConfig(vocab_size=20, max_position_embeddings=40, attn_implementation="eager", **sizes, **heads)
    return tf.BartForConditionalGeneration(config).eval()


def test_eager_cross_attention_is_the_softmax_of_its_projections():
    model, ids, targets = bart(), torch.randint(3, 20, (1, 9)), torch.randint(3, 20, (5,))
    seen = {}
    part = model.model.decoder.layers[1].encoder_attn
    hooks = [
        getattr(part, n).register_forward_hook(lambda m, i, o, n=n: seen.update({n: o})) for n in ("q_proj", "k_proj")
    ]
    maps = explanation.cross_attention(model, {"input_ids": ids}, targets)
    for hook in hooks:
        hook.remove()
    q, k = (seen[name][0].unflatten(-1, (2, 8)).transpose(0, 1) for name in ("q_proj", "k_proj"))
    torch.testing.assert_close(maps[1], (q @ k.mT * 8**-0.5).softmax(-1))
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 5))


def test_everything_on_an_encoder_decoder():
    """Embeddings and the encoder's output; random weights explain nothing, and all of it is the same twice."""
    model, ids, targets = bart(), torch.randint(3, 20, (1, 9)), torch.randint(3, 20, (5,))
    embedded = model.get_input_embeddings()(ids)[0].detach()
    encoded = model.get_encoder()(ids).last_hidden_state[0].detach()
    for given, x in (("inputs_embeds", embedded), ("encoder_outputs", encoded)):
        score = explanation.forced(model, targets, given)
        plain = model(input_ids=ids, decoder_input_ids=targets[None]).logits.log_softmax(-1)
        torch.testing.assert_close(score(x[None]), plain)
        found = explanation.saliency(score, x, torch.arange(9), explanation.masks(100, 9))
        assert found.equal(explanation.saliency(score, x, torch.arange(9), explanation.masks(100, 9)))
        told = explanation.agreement(found, explanation.cross_attention(model, {"input_ids": ids}, targets))
        assert told.heads.shape == (2, 2)
        assert told.layers.shape == told.columns.shape == (2,)


rand, saliency = torch.rand, explanation.saliency


def nothing(x):
    return x * math.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explanation.forced(tiny("llama"), torch.ones(3), "inputs_embeds"), "LlamaForCausalLM has no encoder"),
        (lambda: explanation.cross_attention(tiny("llama"), {}, torch.ones(3)), "needs an encoder-decoder"),
        (lambda: explanation.forced(bart(), torch.ones(3), "input_embeds"), "Did you mean 'inputs_embeds'"),
        (lambda: explanation.agreement(rand(T, S), rand(1, 1, T, 5)), "12 frames .* cannot be pooled to 5"),
        (lambda: explanation.agreement(rand(T, S), rand(1, 1, 4, S)), r"relevance must be \[T, S\]"),
        (lambda: saliency(None, rand(S, 3), torch.arange(5), None), "the input begins with"),
        (lambda: saliency(None, rand(S), torch.arange(S), torch.ones(1, 5)), "segments go from 0 to 11"),
        (lambda: saliency(nothing, rand(2, 3), torch.arange(2), torch.ones(1, 2)), "NaN"),
        (lambda: explanation.deletion(None, rand(4), rand(4), step=0.0), r"must be in \(0, 1\]"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()

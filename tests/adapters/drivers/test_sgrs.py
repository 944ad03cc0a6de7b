"""The sampler against plain top-K sampling, its saliency against whole maps, and a toy that copies its last output."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import regard
from contracts.snapshot import snapshot
from families import tiny
from regard.adapters.drivers import sgrs

IDS = torch.tensor([[1, 9, 14, 33, 7]])


def sample(model, ids=IDS, seed=0, **options):
    options = {"tokens": 6, "layers": (0, 2), "generator": torch.Generator().manual_seed(seed)} | options
    return sgrs.generate(model, {"input_ids": ids}, **options)


@pytest.mark.parametrize("alpha", [0.0, 1e-12])
def test_alpha_zero_is_plain_sampling(alpha):
    """Also where the floor is too low to matter, but everything is computed."""
    model, drawn, ids = tiny("llama"), torch.Generator().manual_seed(0), IDS
    for _ in range(6):
        with torch.no_grad():
            best = model(ids).logits[0, -1].softmax(-1).topk(5)
        chosen = torch.multinomial(best.values, 1, generator=drawn)
        ids = torch.cat([ids, best.indices[chosen][None]], 1)
    found = sample(model, alpha=alpha)
    assert found.ids == tuple(ids[0, 5:].tolist())
    assert found.evaluations == (0,) + (int(alpha > 0),) * 5


def whole_maps(model, ids, prompt, candidate, layers):
    """s of `candidate` from eager probabilities of the whole sequence, kept for their gradients."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True)
    slopes = torch.autograd.grad(-out.logits[0, -1].log_softmax(-1)[candidate], [out.attentions[i] for i in layers])
    found = []
    for layer, slope in zip(layers, slopes, strict=True):
        raw = (out.attentions[layer] * slope).abs().mean(1)[0]
        assert raw.triu(1).eq(0).all()
        # Only the last row has any bearing in the last layer; in earlier ones all rows do.
        found.append(F.normalize(raw[-1], dim=0)[prompt:].mean())
    model.set_attn_implementation(own)
    return float(torch.stack(found).mean().detach())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_saliency_is_that_of_whole_maps(family):
    """Also where a window is shorter than the sequence: one token from a cache says what the whole maps say."""
    model = tiny(family)
    found = sample(model, alpha=0.6, tokens=7)
    ids = torch.cat([IDS, torch.tensor([found.ids])], 1)
    for n in (1, 3, 6):
        expected = whole_maps(model, ids[:, : 5 + n], 5, found.ids[n], (0, 2))
        assert found.saliency[n] == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert found.saliency[0] == 1


def test_the_rule_of_rejection():
    """Acceptance by the floor, renormalised draws, the fallback, and at most K examined."""
    model = tiny("llama")
    for seed in range(3):
        found = sample(model, seed=seed, alpha=1.0, window=3, candidates=4, draws=2, tokens=8)
        for n, (value, count) in enumerate(zip(found.saliency, found.evaluations, strict=True)):
            past = found.saliency[max(n - 3, 0) : n]
            assert count <= 4
            if n and value < sum(past) / len(past):
                assert count == 4
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    value = [0.1, 0.5, 0.2, 0.5].__getitem__
    drawn = torch.Generator().manual_seed(0)
    told = [sgrs._choose(probabilities, value, 0.4, 2, drawn) for _ in range(400)]
    assert {chosen for chosen, *_ in told} == {1, 3}
    assert all(count <= (2 if chosen == 3 else 4) for chosen, _, count in told)
    assert sgrs._choose(probabilities, value, 0.9, 4, drawn) == (1, 0.5, 4)
    assert sgrs._choose(torch.tensor([1.0, 0.0]), value, 0.4, 2, drawn) == (1, 0.5, 2)


FOLLOWS, IGNORES = 40, 41


def copying():
    """One layer that looks at all alike: token 7 makes `IGNORES` likelier where it is read, others `FOLLOWS`."""
    small = {"hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = tf.LlamaConfig(vocab_size=96, num_hidden_layers=1, tie_word_embeddings=False, eos_token_id=None, **small)
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        layer, embed = model.model.layers[0].self_attn, model.model.embed_tokens.weight
        embed[:, 0] = 1
        embed[:, 31] = 10  # so that norms hardly depend on what is read
        embed[7, 0], embed[7, 1] = 0, 1
        layer.v_proj.weight.copy_(torch.eye(32))
        layer.o_proj.weight[8, 0] = layer.o_proj.weight[9, 1] = 0.5
        model.lm_head.weight[FOLLOWS, 8] = model.lm_head.weight[IGNORES, 9] = 1.0
    return model


def test_what_follows_the_output_is_taken():
    model = copying()
    ids = torch.tensor([[7] * 6])
    # What is said first is another token: `FOLLOWS` needs it read, `IGNORES` needs the prompt read.
    found = sample(model, ids, alpha=0.6, tokens=2, layers=(0,), candidates=5, draws=3)
    assert found.ids[0] != 7
    assert found.ids[1] == FOLLOWS
    with sgrs.intercept(model, run := sgrs._Row()):
        run.layers, run.windows, run.listening = frozenset({0}), (None,), True
        log_probs = model(torch.tensor([[7] * 6 + [FOLLOWS]])).logits[0, -1].log_softmax(-1)
        s = sgrs._examine(run, log_probs, torch.tensor([FOLLOWS, IGNORES]), 1)
        assert s(0) >= 5 * s(1)


def test_a_picture_in_the_prompt_and_a_stop_token():
    model = tiny("llava")
    ids = torch.tensor([[1, 95, 95, 95, 95, 9, 14]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8), "attention_mask": torch.ones_like(ids)}
    call = lambda **more: sgrs.generate(  # noqa: E731
        model, inputs, tokens=6, layers=(1,), generator=torch.Generator().manual_seed(0), **more
    )
    found = call()
    assert len(found.ids) == 6
    assert call(stop=found.ids[2:3]).ids == found.ids[:3]


def test_the_model_is_left_as_it_was():
    model = tiny("llama")
    before = snapshot(model)
    sample(model)
    assert snapshot(model) == before
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    before = snapshot(model)
    with pytest.raises(regard.RegardError, match="logits of token 0 are not finite"):
        sample(model)
    assert snapshot(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"candidates": 97}, "at most the vocabulary of 96"),
        ({"alpha": -0.1}, "alpha must be a number from 0 up, got -0.1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"layers": (6, 7, 8)}, "layers must name some of 0..2, got 6, 7, 8"),
        ({"layers": ()}, "got none"),
        ({"ids": torch.ones(2, 3, dtype=torch.long)}, r"one row: input_ids must be \[1, n\], got \[2, 3\]"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(regard.RegardError, match=message):
        sample(tiny("llama"), **options)


def test_what_hides_gradients_or_rows_is_named():
    model = tiny("llama")
    with torch.inference_mode(), pytest.raises(regard.RegardError, match="saliency needs gradients"):
        sample(model)
    with torch.inference_mode():
        assert len(sample(model, alpha=0.0).ids) == 6
    with torch.no_grad():
        assert sample(model.requires_grad_(False)) == sample(tiny("llama"))
    padded = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    with pytest.raises(regard.RegardError, match="attention_mask has zeros"):
        sgrs.generate(model, padded, tokens=2, layers=(0,))

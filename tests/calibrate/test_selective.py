"""Fitting temperatures: what is learnt, that nothing else is, and that longer texts gain by it."""

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import regard
from contracts.snapshot import snapshot
from families import VOCABULARY, tiny
from regard.adapters.families import open_decoder
from regard.adapters.intercept import intercept
from regard.calibrate import selective
from regard.ops.qkv.selective import temperature


def text(n: int = 600) -> torch.Tensor:
    return torch.randint(2, VOCABULARY - 6, (n,), generator=torch.Generator().manual_seed(3))


def fit(model, steps=4, **more):
    return selective.fit(model, text(), **{"steps": steps, "length": 60, "every": 2} | more)


def loss(model, fitted, form="exp"):
    """Mean loss of the windows that `fit` holds out, through the recipe."""
    held = text().view(10, 60)[-2:]
    with torch.no_grad(), regard.attach(model, [regard.place("selective", form=form, **fitted)]):
        logits = model(input_ids=held).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), held[:, 1:].flatten()))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_only_the_new_numbers_are_fitted_and_the_model_is_left_as_it_was(family):
    model = tiny(family).train()
    next(model.parameters()).requires_grad_(False)
    open_decoder(model).attentions[1].eval()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    before, told = snapshot(model), []
    fitted = fit(model, progress=lambda done, total: told.append((done, total)))
    decoder = open_decoder(model)
    assert {name: tuple(t.shape) for name, t in fitted.items()} == {
        "betas": (decoder.layers,),
        "query_map": (decoder.layers, decoder.head_dim),
        "value_map": (decoder.layers, decoder.head_dim),
    }
    assert not any(t.requires_grad for t in fitted.values())
    assert sum(t.numel() for t in fitted.values()) < 0.005 * sum(p.numel() for p in model.parameters())
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert snapshot(model) == before
    again = fit(model)
    assert all(torch.equal(again[name], t) for name, t in fitted.items())


@pytest.mark.parametrize("form", ["exp", "linear"])
def test_what_was_fitted_is_what_the_recipe_runs_and_never_loses_on_held_out_text(form):
    model = tiny("llama")
    start = {"betas": torch.full((3,), selective.START[form])}
    fitted = fit(model, steps=30, form=form)
    assert loss(model, fitted, form) < loss(model, start, form)
    # A rate this large can only do harm; what it began with is kept.
    ruined = fit(model, steps=2, form=form, rate=15.0, map_rate=5.0)
    assert loss(model, ruined, form) <= loss(model, start, form)


def test_betas_alone():
    assert list(fit(tiny("llama"), maps=False)) == ["betas"]


KEYS, VALUES, FILLERS, PAIRS = 8, 4, 16, 4
QUERY = KEYS * VALUES
VALUE = QUERY + KEYS
FILLER = VALUE + VALUES


def retrieval(rows, length, drawn):
    """Rows `[rows, length]` of filler with four key-value pairs in it, each asked for at the end."""
    ids = torch.randint(FILLER, FILLER + FILLERS, (rows, length), generator=drawn)
    keys = torch.rand(rows, KEYS, generator=drawn).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (rows, PAIRS), generator=drawn)
    body = length - 2 * PAIRS
    ids.scatter_(1, torch.rand(rows, body, generator=drawn).argsort(1)[:, :PAIRS], keys * VALUES + values)
    ids[:, body::2], ids[:, body + 1 :: 2] = QUERY + keys, VALUE + values
    return ids


def asked(ids):
    """Where the questions stand."""
    return torch.arange(ids.shape[1] - 2 * PAIRS, ids.shape[1], 2)


def trained(seed):
    """Two layers without positions (which would not reach 512), trained to retrieve from 64 tokens."""
    torch.manual_seed(seed)
    config = tf.SmolLM3Config(
        vocab_size=FILLER + FILLERS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=2, no_rope_layers=[0, 0], initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model, drawn = tf.AutoModelForCausalLM.from_config(config), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        ids = retrieval(32, 64, drawn)
        logits, at = model(input_ids=ids, use_cache=False).logits, asked(ids)
        optimiser.zero_grad()
        F.cross_entropy(logits[:, at].flatten(0, 1), ids[:, at + 1].flatten()).backward()
        optimiser.step()
    return model.eval()


@torch.no_grad()
def sharpness(model, ids, betas):
    """Largest attention weight of each question, mean over heads, layers and questions; computed by hand."""
    found, T = [], ids.shape[1]

    def run(call):
        tau = 1 if betas is None else temperature(torch.arange(1, T + 1), betas[call.seat.layer])[:, None]
        scores = (tau * call.query) @ call.key.mT * call.scale
        weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
        found.append(weights[:, :, asked(ids)].amax(-1).mean())
        return weights @ call.value

    with intercept(model, run) as decoder:
        decoder.module(input_ids=ids, use_cache=False)
    return float(torch.stack(found).mean())


@torch.no_grad()
def accuracy(model, ids):
    right = model(input_ids=ids, use_cache=False).logits[:, asked(ids)].argmax(-1) == ids[:, asked(ids) + 1]
    return float(right.float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_retrieval_learnt_at_64_tokens_holds_at_512(seed):
    """Also the fit sees 64 tokens and no more; how much of it is growth with log n, not sharpness, is not told here."""
    model, drawn = trained(seed), torch.Generator().manual_seed(10)
    fitted = selective.fit(model, retrieval(40, 64, drawn).flatten(), length=64, maps=False)
    short, long = retrieval(64, 64, drawn), retrieval(64, 512, drawn)
    plain = accuracy(model, long)
    with regard.attach(model, [regard.place("selective", **fitted)]):
        assert accuracy(model, short) > 0.95
        kept = accuracy(model, long)
    assert kept > max(0.98, plain + 0.05)
    assert sharpness(model, long, fitted["betas"]) > 1.5 * sharpness(model, long, None)


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        (text(119), {}, "needs 120 tokens of text .* got 119; give more text or a smaller length"),
        (text()[None], {}, r"must be token ids, \[n\] integers with n >= 1, got \[1, 600\] torch.int64"),
        (text().float(), {}, r"must be token ids, .* got \[600\] torch.float32"),
        (text() + VOCABULARY, {}, "holds token .*; this model's vocabulary is 0 to 95"),
        (text(), {"form": "expo"}, "unknown form of 'selective' 'expo'; known: exp, linear. Did you mean 'exp'"),
        (text(), {"steps": 0}, "steps must be at least 1, got 0"),
        (text(), {"length": 1}, "length must be at least 2, got 1"),
        (text(), {"rate": -1.0}, "rate must be above 0, got -1.0"),
    ],
)
def test_what_cannot_be_fitted_is_named(given, more, message):
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(regard.RegardError, match=message):
        selective.fit(model, given, **{"length": 60} | more)
    assert snapshot(model) == before


def test_a_model_without_a_head_and_tensors_of_another_model_are_named():
    with pytest.raises(regard.RegardError, match="LlamaModel gives no logits; fit on the model with its"):
        fit(tiny("llama").model)
    fitted = fit(tiny("llama"))
    other = tf.AutoModelForCausalLM.from_config(
        tf.LlamaConfig(
            vocab_size=9, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, head_dim=8
        )
    )
    with pytest.raises(regard.RegardError, match=r"betas \[3\], this model needs \[layers\] = \[2\]"):
        regard.attach(other, [regard.place("selective", **fitted)])

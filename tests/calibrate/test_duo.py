"""Gate training: the pieces that decide what is learnt, and that nothing but gates is."""

import pytest
import torch

import regard
from contracts.snapshot import snapshot
from families import VOCABULARY, tiny
from regard.adapters.families import open_decoder
from regard.calibrate import duo
from regard.ops.cache.duo import streaming_heads


def text(n: int = 600) -> torch.Tensor:
    return torch.randint(2, VOCABULARY - 6, (n,), generator=torch.Generator().manual_seed(3))


def fit(model, steps=4, **more):
    return duo.fit(model, text(), steps=steps, length=96, sink=2, recent=8, **more)["gates"]


def test_only_gates_are_fitted_and_the_model_is_left_as_it_was():
    model = tiny("qwen2").train()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    told = []
    gates = fit(model, progress=lambda done, total: told.append((done, total)))
    decoder = open_decoder(model)
    assert gates.shape == (decoder.layers, decoder.kv_heads)
    assert not gates.requires_grad
    assert 0 <= float(gates.min()) <= float(gates.max()) <= 1
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    model.train()
    assert snapshot(model) == before
    assert torch.equal(fit(model), gates)


def test_a_head_whose_output_is_thrown_away_learns_to_stream():
    model = tiny("llama")
    D = open_decoder(model).head_dim
    with torch.no_grad():
        # KV head 1 of layer 0 feeds query heads 2 and 3; nothing reads what they fetch.
        model.model.layers[0].self_attn.o_proj.weight[:, 2 * D :] = 0
    gates = fit(model, steps=16, weight=0.01)
    assert gates[0, 1] < 0.1
    assert streaming_heads(gates, 1 / 6)[0, 1]


def test_no_cost_keeps_every_gate_open():
    gates = fit(tiny("llama"), steps=3, weight=0.0)
    assert torch.equal(gates, torch.ones_like(gates))


def test_fitted_gates_make_a_recipe():
    model = tiny("llama")
    gates = fit(model)
    with regard.attach(model, [regard.place("duo", gates=gates, sparsity=0.5, sink=2, recent=5)]) as handle:
        assert "window 5" in handle.explain()


def test_passkeys_are_hidden_once_and_asked_for_once():
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.arange(1000)
    made, answers = duo.passkeys(tokens, 200, drawn, count=3, key=2, answer=5)
    assert made.shape == answers.shape == (200,)
    assert int(answers.sum()) == 15
    questions = made[-21:].view(3, 7)
    body = made[:-21].unfold(0, 7, 1)
    assert all(int((body == question).all(1).sum()) == 1 for question in questions)
    # A row that counts predicts the next token, which belongs to an answer and never to a question's name.
    assert torch.equal(made[1:][answers[:-1]].view(3, 5), questions[:, 2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 700}, "needs 700 tokens of text, got 600"),
        ({"length": 96, "recent": 64}, "see too much of 96 tokens"),
    ],
)
def test_texts_too_short_are_named(options, message):
    with pytest.raises(regard.RegardError, match=message):
        duo.fit(tiny("llama"), text(), **options)

"""Boundary training: what the labels say, what is learnt from them, and that nothing else changes."""

import pytest
import torch

import regard
from contracts.snapshot import snapshot
from families import VOCABULARY, tiny
from regard.calibrate import dhsa
from regard.core.pattern import Pattern
from regard.ops.attention import attend
from regard.ops.sparsity.dhsa import CARD, gaps
from regard.primitives.chunks import chunk_scores, fill, peaks


def text(n: int = 300) -> torch.Tensor:
    return torch.randint(2, VOCABULARY - 6, (n,), generator=torch.Generator().manual_seed(3))


def fit(model, **more):
    return dhsa.fit(model, text(), **{"texts": 2, "length": 48, "passes": 2} | more)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_only_the_predictor_is_fitted_and_the_model_is_left_as_it_was(family):
    model = tiny(family).train()
    before, told = snapshot(model), []
    made = fit(model, progress=lambda done, total: told.append((done, total)))
    sizes = {"kv_heads": 2, "head_dim": 8}
    for name, tensor in made.items():
        assert list(tensor.shape) == [sizes.get(axis, axis) for axis in CARD.options[name].shape]
        assert not tensor.requires_grad
    assert told == [(n, 6) for n in range(1, 7)]
    assert model.training
    assert snapshot(model) == before
    assert all(p.grad is None for p in model.parameters())
    again = fit(model)
    assert all(torch.equal(made[name], again[name]) for name in made)
    model.eval()
    small = {"budget": 8, "block": 2, "first": 1, "last": 2, "dense": 1, "threshold": 0.0}
    with regard.attach(model, [regard.place("dhsa", **small, **made)]) as handle:
        assert "dhsa of 8 keys" in handle.explain()


def test_mean_attention_is_the_models_own():
    drawn = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 150, 8, generator=drawn), torch.randn(1, 2, 150, 8, generator=drawn)
    pattern, eye = Pattern.window(70), torch.eye(150).expand(1, 2, -1, -1)
    # Attention over one-hot values is its own map.
    want, _ = attend(q, k, eye, pattern=pattern, scale=0.4)
    found = dhsa.mean_attention(q, k, pattern, 0.4)
    torch.testing.assert_close(found, want.mean((0, 1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [None, 7])
def test_masses_equal_the_loop(rows):
    drawn = torch.Generator().manual_seed(0)
    attention = torch.rand(30, 30, generator=drawn).tril()
    past, after = dhsa.masses(attention, 3, rows)
    for t in range(30):
        later = attention[t + 3 :][:rows]
        torch.testing.assert_close(past[t].float(), later[:, max(t - 2, 0) : t + 1].sum(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after[t].float(), later[:, t + 1 : t + 4].sum(), atol=1e-5, rtol=1e-5)


def test_labels_peak_where_attention_jumps():
    for jump in (11, 30, 44):
        attention = torch.full((64, 64), 0.01)
        attention[:, : jump + 1] = 0.05
        label, known = dhsa.labels(*dhsa.masses(attention.tril()))
        assert int(label.masked_fill(~known, 0).argmax()) == jump
        assert label.min() >= 0.5 - 1e-6
        assert known.nonzero()[:, 0].tolist() == list(range(3, 60))


def test_the_loss_is_small_where_the_logits_are_the_labels_and_counts_what_is_known():
    label = torch.tensor([[0.02, 0.98, 0.5]])
    known = torch.tensor([[True, True, False]])
    right = dhsa.focal_loss(torch.logit(label), label, known)
    assert right < dhsa.focal_loss(-torch.logit(label), label, known) / 50
    logit = torch.tensor([[0.7]])
    p = torch.sigmoid(logit)
    want = -((1 - (p * 0.9 + (1 - p) * 0.1)) ** 2) * (2 * 0.9 * p.log() + 0.1 * (1 - p).log())
    found = dhsa.focal_loss(logit, torch.tensor([[0.9]]), torch.tensor([[True]]), positive=2.0)
    torch.testing.assert_close(found, want[0, 0])


def piecewise(seed: int, total: int = 512, width: int = 16):
    """Keys `[1, total, width]` constant in pieces with some noise, and where pieces begin."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = torch.randint(12, 22, (total,), generator=drawn)
    begins = sizes.cumsum(0)
    begins = begins[begins < total]
    piece = torch.zeros(total, dtype=torch.long).index_fill(0, begins, 1).cumsum(0)
    keys = torch.randn(len(begins) + 1, width, generator=drawn)[piece]
    return (keys + 0.1 * torch.randn(total, width, generator=drawn))[None], begins


def test_a_trained_predictor_finds_pieces_and_its_chunks_recall_more_than_fixed_blocks():
    examples = []
    for seed in range(24):
        keys, begins = piecewise(seed)
        label = torch.full((1, 512), 0.5).index_fill(1, begins, 0.99)
        examples.append((keys, label, torch.ones(1, 512, dtype=torch.bool)))
    made = dhsa._train((examples, 2, 8), 12, 3e-3, 2.0, 0, dhsa._Told(None, 288))
    recall, hits, share = {"predicted": 0.0, "fixed": 0.0}, 0.0, 0.0
    for seed in range(50, 56):
        keys, begins = piecewise(seed)
        real = torch.ones(1, 512, dtype=torch.bool)
        with torch.no_grad():
            logits = gaps(keys, real, tuple(made[name] for name in dhsa.NAMES))
        found = peaks(logits, logits > 1.1, torch.tensor([64]), 8)[0].nonzero()[:, 0]
        hits += len(set(found.tolist()) & set(begins.tolist())) / len(begins) / 6
        share += len(found) / len(begins) / 6
        queries = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(seed))
        best = (queries[0] @ keys[0].T).topk(64).indices
        span = torch.zeros(1, 40, dtype=torch.long), torch.full((1, 40), 512)
        own = torch.cat((torch.zeros(1, dtype=torch.long), found[found > 0], torch.tensor([512])))
        for name, cuts in (("predicted", own), ("fixed", torch.arange(0, 513, 16))):
            scores = chunk_scores(queries, keys, cuts[None], *span)
            ranks = fill(scores, cuts[None], *span, span[1], budget=64, first=0, last=0)[0]
            recall[name] += float((best[:, :, None] == ranks[:, None]).any(-1).float().mean()) / 6
    assert hits > 0.7, hits
    assert share < 1.2, share
    assert recall["predicted"] > recall["fixed"] + 0.03, recall


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 400}, "needs 400 tokens of text, got 300"),
        ({"length": 8}, "texts of 16 tokens or more, got length=8"),
        ({"texts": 0}, "texts >= 1"),
        ({"layer": 3}, r"layer 3 is out of range; this model has 3 \(layers 0 to 2\)"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(regard.RegardError, match=message):
        fit(tiny("llama"), **options)

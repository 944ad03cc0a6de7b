"""Saliency against the gradient of an all-ones gate on written-out attention, and its sums over rows."""

import pytest
import torch

from contracts.snapshot import snapshot
from families import VOCABULARY, tiny
from regard import observe
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.observe.saliency import tiled

T = 13


def made():
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, T, 6, generator=drawn, dtype=torch.float64) for heads in (4, 2, 2, 4)]


def explicit(q, k, v):
    """`(weights, values)` of causal attention, heads repeated."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    scores = (q @ k.mT * 0.4).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1), v


CALL = {"pattern": Pattern.causal(), "scale": 0.4, "q_positions": torch.arange(T)[None],
        "k_positions": torch.arange(T)[None]}  # fmt: skip


def test_is_the_gradient_of_an_all_ones_gate():
    q, k, v, dout = made()
    weights, lse, values = explicit(q, k, v)
    gate = torch.ones_like(weights).requires_grad_()
    (known,) = torch.autograd.grad(((weights * gate) @ values * dout).sum(), gate)
    every = torch.arange(T + 1)
    found = tiled(q, k, v, lse, dout, row_edges=every, key_edges=every, **CALL)
    torch.testing.assert_close(found, known.abs())
    rows, keys = torch.tensor([0, 3, 7, T]), torch.tensor([0, 10, T])
    pooled = tiled(q, k, v, lse, dout, row_edges=rows, key_edges=keys, **CALL)
    torch.testing.assert_close(pooled[:, :, 1, 0], known.abs()[:, :, 3:7, :10].sum((-2, -1)))
    torch.testing.assert_close(pooled[:, :, 2, 1], known.abs()[:, :, 7:, 10:].sum((-2, -1)))


def test_gradcheck():
    q, k, v, dout = (x[:1, : x.shape[1] // 2].requires_grad_() for x in made())
    edges = torch.tensor([0, 5, T])

    def run(q, k, v, dout):
        lse = (q @ k.mT * 0.4).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).logsumexp(-1)
        return tiled(q, k, v, lse, dout, row_edges=edges, key_edges=edges, **CALL)

    assert torch.autograd.gradcheck(run, (q, k, v, dout))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_of_a_model_equals_eager_with_gates(family):
    """Left padding, windows and softcaps; rows after the last one that counts do not exist, earlier ones do."""
    ids = torch.randint(2, VOCABULARY - 3, (2, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs, model = {"input_ids": ids, "attention_mask": mask}, tiny(family).requires_grad_(False)
    before = snapshot(model)
    with torch.no_grad():
        found = observe.saliency(model, inputs, size=T)
    assert snapshot(model) == before
    model.requires_grad_(True).set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True, use_cache=False)
    logs = out.logits[:, -1].log_softmax(-1)
    assert torch.equal(found.target, logs.argmax(-1))
    loss = -logs.amax(-1)
    torch.testing.assert_close(found.loss, loss.detach())
    grads = torch.autograd.grad(loss.sum(), out.attentions)
    known = torch.stack([a * g for a, g in zip(out.attentions, grads, strict=True)]).detach()
    known = known * mask[:, None, :, None]
    torch.testing.assert_close(found.maps, known.abs(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found.rows * mask[:, None], known.sum(-1), atol=1e-5, rtol=1e-3)
    assert not found.maps[-1, :, :, :-1].any(), "in the last layer only the row that emits the token counts"


def test_bad_input():
    model, ids = tiny("llama"), torch.arange(2, 12)[None]
    with torch.inference_mode(), pytest.raises(RegardError, match=r"torch\.inference_mode forbids"):
        observe.saliency(model, ids)
    with pytest.raises(RegardError, match="target 96 is not in a vocabulary of 96"):
        observe.saliency(model, ids, target=96)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(RegardError, match="row 0 ends in padding"):
        observe.saliency(model, {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(RegardError, match="the loss of row 0 is NaN"):
        observe.saliency(model, ids)

"""Soft Injection [028]: the oracles of its sheet."""

import pytest
import torch

import regard
from families import tiny
from regard.core.placement import Where
from regard.core.step import Step
from regard.ops.heads import soft_injection

WHERE = Where(1, 3, 4, 2, 8, (0, 1))


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def made(**more):
    return soft_injection.mix(WHERE, **{"strength": 1.0, "task": drawn(3, 4, 8), "weights": drawn(3, 4)} | more)


def step(start: int, width: int, prompt: int | None) -> Step:
    return Step(start, width, 2, torch.device("cpu"), None, prompt)


def test_only_the_last_prompt_token_is_blended_and_linearly():
    out = torch.randn(2, 4, 6, 8)
    half, whole = (made(strength=s).run(out, step(4, 6, 8), {}) for s in (0.5, 1.0))
    kept = [0, 1, 2, 4, 5]
    assert torch.equal(whole[:, :, kept], out[:, :, kept])
    a, t = drawn(3, 4)[1][:, None], drawn(3, 4, 8)[1]
    torch.testing.assert_close(whole[:, :, 3], (1 - a) * out[:, :, 3] + a * t)
    torch.testing.assert_close(half[:, :, 3], (out[:, :, 3] + whole[:, :, 3]) / 2)


def test_full_weight_replaces_and_no_weight_leaves_every_bit():
    out = torch.randn(2, 4, 3, 8)
    torch.testing.assert_close(
        made(weights=torch.ones(3, 4)).run(out, step(0, 3, 3), {})[:, :, 2], drawn(3, 4, 8)[1].expand(2, 4, 8)
    )
    assert torch.equal(made(weights=torch.zeros(3, 4)).run(out, step(0, 3, 3), {}), out)
    assert made(strength=0.0) is None


@pytest.mark.parametrize("when", [(0, 3, None), (5, 3, 5), (0, 3, 9)])
def test_other_forwards_are_left_alone(when):
    out = torch.randn(2, 4, 3, 8)
    assert made().run(out, step(*when), {}) is out


def test_generated_tokens_see_it_through_the_cache_alone():
    model = tiny("llama")
    ids = torch.randint(2, 90, (1, 9))
    recipe = [regard.place("soft_injection", task=3 * drawn(3, 4, 8), weights=torch.ones(3, 4))]
    with regard.attach(model, recipe) as handle, torch.no_grad():
        with handle.prompting(9):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        with handle.responding():
            seen = model(input_ids=ids[:, :1], past_key_values=cache).logits
    with torch.no_grad():
        plain = model(input_ids=torch.cat((ids, ids[:, :1]), 1)).logits[:, -1:]
    assert not torch.allclose(seen, plain)


def test_missing_or_misshapen_tensors_are_named():
    with pytest.raises(regard.RegardError, match=r"needs task of shape \[3, 4, 8\], got nothing"):
        made(task=None)
    with pytest.raises(regard.RegardError, match=r"needs weights of shape \[3, 4\], got \[4, 3\]"):
        made(weights=drawn(4, 3))

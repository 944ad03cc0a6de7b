"""ACT [065]: the oracles of its sheet, against the paper's own loop over a built map."""

from itertools import pairwise

import pytest
import torch

import regard
from contracts.decoding import prompts
from families import tiny
from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.core.slots import Slots
from regard.core.step import Step
from regard.ops import layer
from regard.ops.attention import attend
from regard.ops.probabilities import act
from regard.primitives.stores import build

WHERE = Where(1, 3, 4, 2, 8, (0, 1))
OPTIONS = {"beta": 0.4, "theta": 0.1, "relative": None, "heads_mask": None}
N, SINK = 24, 7


def made(**more):
    return act.reweigh(more.pop("where", WHERE), **OPTIONS | more)


def planted(batch=2, sink=SINK, strength=6.0):
    """Queries and keys of 4 and 2 heads in which every query of KV head 0 looks for key `sink` (None: for none)."""
    g = torch.Generator().manual_seed(0)
    q, k = (0.3 * torch.randn(batch, heads, N, 8, generator=g, dtype=torch.float64) for heads in (4, 2))
    q[..., 0] = 1.0
    if sink is not None:
        k[:, 0, sink, 0] = strength
    return q, k


def maps(edit, q, k, cuts=(), prompt=N, padding=None, pattern=None):
    """The layer's probabilities `[B, H, N, N]` with `edit` in force: outputs of values that name their keys."""
    pattern = pattern or Pattern.causal()
    v = torch.eye(N, dtype=q.dtype).expand(*k.shape[:2], N, N)
    slots = Slots(pattern, (None, None), (None, None), reweigh=() if edit is None else (edit,))
    store, outs = build(pattern, (None, None), (None, None), 2, attend), []
    for start, stop in pairwise([0, *cuts, N]):
        step = Step(start, stop - start, q.shape[0], q.device, padding, prompt)
        view = store.append(k[:, :, start:stop], v[:, :, start:stop], step)
        outs.append(layer.run(slots, view, q[:, :, start:stop], step, store.state, scale=1.0))
    return torch.cat(outs, 2)


def loop(A, prompt=N, theta=0.1, beta=0.4, heads=(0, 1, 2, 3), pad=()):
    """The paper: levels of columns, sinks, damp and spread, one row and key at a time."""
    A, edited = A.clone(), A.clone()
    for b in range(len(A)):
        first = pad[b] if len(pad) else 0
        for h in heads:
            rows = range(first, prompt)
            level = {j: sum(float(A[b, h, i, j]) for i in rows if i >= j) / (prompt - j) for j in rows}
            sinks = [j for j, c in level.items() if c > theta and j != first]
            for i in range(first, N):
                freed = sum((1 - beta) * float(A[b, h, i, j]) for j in sinks)
                others = [j for j in range(first, i + 1) if j not in sinks]
                rest = sum(float(A[b, h, i, j]) for j in others)
                if not rest:
                    continue
                for j in sinks:
                    edited[b, h, i, j] = beta * A[b, h, i, j]
                for j in others:
                    edited[b, h, i, j] = A[b, h, i, j] + freed * A[b, h, i, j] / rest
    return edited


@pytest.mark.parametrize("prompt", [N, 15])
def test_a_forward_is_the_papers_loop_and_a_planted_sink_falls_by_60_percent(prompt):
    q, k = planted()
    plain, edited = maps(None, q, k), maps(made(), q, k, prompt=prompt)
    torch.testing.assert_close(edited, loop(plain, prompt), atol=1e-12, rtol=1e-9)
    assert not torch.allclose(edited, plain)
    torch.testing.assert_close(edited.sum(-1), torch.ones_like(edited[..., 0]))
    assert not edited.triu(1).any()
    before, after = (A[:, :2, SINK:prompt, SINK].mean(-1) for A in (plain, edited))
    assert before.min() > 0.5
    torch.testing.assert_close(1 - after / before, torch.full_like(before, 0.6))
    # Two keys that are no sinks keep their ratio in every row.
    torch.testing.assert_close(edited[:, 0, 10:, 3] / edited[:, 0, 10:, 4], plain[:, 0, 10:, 3] / plain[:, 0, 10:, 4])


def test_row_0_stays_one_hot_and_the_first_token_is_no_sink():
    q, k = planted(sink=0)
    plain = maps(None, q, k)
    assert plain[:, 0, :, 0].mean() > 0.5
    edited = maps(made(theta=0.4), q, k)
    assert torch.equal(edited[:, :2], plain[:, :2])
    assert torch.equal(maps(made(), *planted())[:, :, 0, 0], torch.ones(2, 4, dtype=torch.float64))


def test_beta_1_is_neutral_and_theta_1_finds_nothing():
    assert made(beta=1.0) is None
    q, k = planted()
    assert torch.equal(maps(made(theta=1.0), q, k), maps(None, q, k))


def test_a_relative_threshold_is_a_multiple_of_uniform_attention():
    q, k = planted(strength=3.0)
    plain = maps(None, q, k)
    torch.testing.assert_close(maps(made(relative=5.0), q, k), loop(plain, theta=5 / N))
    torch.testing.assert_close(maps(made(relative=5.0), q, k, prompt=12), loop(plain, 12, theta=5 / 12))


def test_left_padding_counts_real_rows_and_excludes_the_first_real_token():
    q, k = planted()
    padding = torch.tensor([SINK, 2])
    plain = maps(None, q, k, padding=padding)
    edited = maps(made(), q, k, padding=padding)
    torch.testing.assert_close(edited, loop(plain, pad=padding.tolist()), atol=1e-12, rtol=1e-9)
    shifted = maps(made(relative=5.0), q, k, padding=padding)
    rows = [loop(plain, theta=5 / (N - pad), pad=padding.tolist())[b] for b, pad in enumerate(padding.tolist())]
    torch.testing.assert_close(shifted, torch.stack(rows), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("cuts", [(15, 18), (4, 9, 15), (15, *range(16, N)), (9, 20)])
def test_response_rows_use_the_sinks_of_the_whole_prompt(cuts):
    """However the prompt came: chunks add up. A chunk's own rows use what there was when they ran."""
    q, k = planted()
    prompt = 15
    plain = maps(None, q, k)
    edited = maps(made(), q, k, cuts, prompt)
    torch.testing.assert_close(edited[:, :, prompt:], loop(plain, prompt)[:, :, prompt:], atol=1e-12, rtol=1e-9)
    first = min(cuts[0], prompt)
    torch.testing.assert_close(edited[:, :, :first], loop(plain, first)[:, :, :first], atol=1e-12, rtol=1e-9)


def test_a_store_that_evicts_keeps_levels_by_arrival():
    q, k = planted()
    pattern = Pattern.sink(2) | Pattern.window(6)
    plain = maps(None, q, k, pattern=pattern)
    seen = pattern.to_dense(N)[0]
    level = plain[..., :15, :].sum(2) / seen[:15].sum(0)
    sinks = (level > 0.1) & (torch.arange(N) > 0) & (torch.arange(N) < 15)
    mass = (plain * sinks[:, :, None]).sum(-1, keepdim=True)
    want = torch.where(sinks[:, :, None], 0.4 * plain, plain * (1 + 0.6 * mass / (1 - mass)))
    for cuts in ((15,), (5, 10, 15, 16, 17, 20)):
        edited = maps(made(), q, k, cuts, 15, pattern=pattern)
        torch.testing.assert_close(edited[:, :, 15:], want[:, :, 15:], atol=1e-12, rtol=1e-9)
    assert sinks[0].any()


def test_a_row_whose_attention_is_all_on_sinks_is_left_alone():
    masses = torch.tensor([[[[0.0, 0.25, 1.0]]], [[[1.0, 0.75, 0.0]]]])
    found = act.gains(masses, beta=0.4)
    assert torch.equal(found[:, 0, 0, 0], torch.ones(2))
    torch.testing.assert_close((found * masses).sum(0), torch.ones(1, 1, 3))
    torch.testing.assert_close(found[:, 0, 0, 1], torch.tensor([1 + 0.6 * 3, 0.4]))


def test_only_chosen_and_placed_heads_are_calibrated():
    q, k = planted()
    plain = maps(None, q, k)
    mask = torch.zeros(3, 4)
    mask[1, 1] = mask[1, 3] = mask[0, 0] = 1
    both = maps(made(heads_mask=mask), q, k)
    torch.testing.assert_close(both, loop(plain, heads=(1, 3)), atol=1e-12, rtol=1e-9)
    assert torch.equal(both[:, 0], plain[:, 0])
    one = Where(1, 3, 4, 2, 8, (0,))
    torch.testing.assert_close(
        maps(made(where=one, heads_mask=mask), q, k), loop(plain, heads=(1,)), atol=1e-12, rtol=1e-9
    )
    assert made(where=Where(2, 3, 4, 2, 8, (0, 1)), heads_mask=mask) is None


def test_an_empty_choice_of_heads_changes_nothing_and_says_so():
    model, (ids, mask) = tiny("llama"), prompts()
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        with regard.attach(model, [regard.place("act", heads_mask=torch.zeros(3, 4))]) as handle:
            assert "act: no head is chosen, nothing changes" in handle.explain()
            torch.testing.assert_close(
                model(input_ids=ids, attention_mask=mask).logits[mask.bool()], plain[mask.bool()]
            )


def test_a_crop_into_the_prompt_is_refused_and_one_behind_it_is_not():
    model, (ids, _) = tiny("llama"), prompts(padding=0)
    with regard.attach(model, [regard.place("act", theta=0.05)]) as handle, torch.no_grad(), handle.prompting(15):
        cache = model(input_ids=ids[:, :15], use_cache=True).past_key_values
        once = model(input_ids=ids[:, 15:], past_key_values=cache).logits
        cache.crop(-6)
        torch.testing.assert_close(model(input_ids=ids[:, 15:], past_key_values=cache).logits, once)
        cache.crop(-7)
        with pytest.raises(regard.RegardError, match="left 14 of the 15 prompt rows"):
            model(input_ids=ids[:, 14:], past_key_values=cache)


def test_a_mask_of_another_shape_is_named():
    with pytest.raises(regard.RegardError, match=r"heads_mask of shape \[layers, heads\] = \[3, 4\], got \[4, 3\]"):
        made(heads_mask=torch.ones(4, 3))
    with pytest.raises(regard.RegardError, match="not finite"):
        made(heads_mask=torch.full((3, 4), torch.nan))
    with pytest.raises(regard.RegardError, match=r"'beta' of 'act' must lie in \[0.0, 1.0\]"):
        regard.attach(tiny("llama"), [regard.place("act", beta=1.5)])

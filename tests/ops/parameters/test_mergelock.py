"""MergeLock [027]: the oracles of its sheet, and the attack it does not withstand."""

from dataclasses import replace

import pytest
import torch

import regard
from contracts.decoding import at_once, prompts
from families import FAMILIES, tiny
from regard.adapters import projections
from regard.adapters.families import open_decoder
from regard.core.placement import Where
from regard.ops.parameters import mergelock

NORMED = ("qwen3", "gemma3", "olmo2", "qwen3_moe")


def locked(model, **more):
    parts = (
        "vo" if model.config.get_text_config().model_type in ("qwen3", "gemma3_text", "olmo2", "qwen3_moe") else "both"
    )
    return regard.attach(model, [regard.place("mergelock", **{"parts": parts} | more)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_logits_are_equal_in_every_family(family, dtype, close):
    model = tiny(family).to(dtype)
    ids, mask = prompts(padding=0)
    before = at_once(model, ids, mask)
    weights = [p.clone() for p in model.parameters()]
    with locked(model):
        torch.testing.assert_close(at_once(model, ids, mask), before, atol=close, rtol=close)
        assert any(not torch.allclose(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_written_back_as_they_were_read(family):
    decoder = open_decoder(tiny(family))
    for layer in range(decoder.layers):
        for parameter, made in projections.write(decoder, layer, projections.read(decoder, layer)):
            assert torch.equal(parameter, made)


def test_products_of_projections_stay_and_locking_twice_composes():
    decoder = open_decoder(tiny("qwen2").double())
    where = Where(0, 3, 4, 2, 8, (0, 1))
    own = projections.read(decoder, 0)
    once = mergelock.edit(where, own, parts="vo", condition=10.0, seed=0)
    twice = mergelock.edit(where, once, parts="vo", condition=10.0, seed=5)
    for made in (once, twice):
        for h in range(4):
            torch.testing.assert_close(made.o[:, h] @ made.v[h // 2], own.o[:, h] @ own.v[h // 2])
    assert not torch.allclose(twice.v, once.v)
    rigid = mergelock.edit(where, own, parts="vo", condition=1.0, seed=0)
    torch.testing.assert_close(rigid.v.norm(), own.v.norm())


def test_a_generic_basis_breaks_rotary_scores_and_a_commuting_one_does_not():
    drawn = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=drawn, dtype=torch.float64)

    def score(basis, turn=0.7):
        c, s = torch.tensor(turn).double().cos(), torch.tensor(turn).double().sin()
        a, b = q @ basis, k @ torch.linalg.inv(basis).mT
        return torch.cat((a[:4] * c - a[4:] * s, a[4:] * c + a[:4] * s)) @ b

    plain = score(torch.eye(8, dtype=torch.float64))
    assert abs(score(mergelock.commuting(8, 8, 10.0, drawn)) - plain) < 1e-12
    assert abs(score(mergelock.invertible(8, 10.0, drawn)) - plain) > 0.1


def test_averaging_with_a_sibling_breaks_and_whoever_has_the_base_undoes_it():
    model = tiny("llama").double()
    decoder = open_decoder(model)
    ids, mask = prompts(padding=0)
    before = at_once(model, ids, mask)
    own = projections.read(decoder, 0)
    # The attack of the sheet: a model fine-tuned by 2 %, then locked; v_locked = C^T v_base solved for C.
    noise = torch.randn(own.v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tuned = replace(own, v=own.v * (1 + 0.02 * noise))
    made = mergelock.edit(Where(0, 3, 4, 2, 8, (0, 1)), tuned, parts="vo", condition=10.0, seed=0)
    assert (made.v - tuned.v).norm() > tuned.v.norm()
    basis = torch.linalg.lstsq(own.v.mT, made.v.mT).solution
    undone = mergelock.turn_vo(made, torch.linalg.inv(basis), 2)
    assert (undone.v - tuned.v).norm() < 0.03 * tuned.v.norm()
    with locked(model):
        mixed = [(p + made) / 2 for p, made in projections.write(decoder, 0, own)]
        for (parameter, _), average in zip(projections.write(decoder, 0, own), mixed, strict=True):
            parameter.data = average
        assert (at_once(model, ids, mask) - before).abs().max() > 0.1


def test_models_that_normalise_queries_and_keys_take_values_alone():
    for family in NORMED:
        with pytest.raises(regard.RegardError, match="normalised after projection; parts='vo'"):
            regard.attach(tiny(family), [regard.place("mergelock")])

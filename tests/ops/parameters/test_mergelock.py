"""MergeLock [027]: the oracles of its sheet, and the attack it does not withstand."""

from dataclasses import replace

import pytest
import torch

import regard
from cases import mergelock as toy
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


def test_whoever_has_the_base_undoes_it():
    """The attack of the sheet: a model is tuned by 2 %, then locked; least squares against the base find the bases."""
    own = projections.read(open_decoder(tiny("llama").double()), 0)
    drawn = torch.Generator().manual_seed(1)

    def near(weight):
        return weight * (1 + 0.02 * torch.randn(weight.shape, generator=drawn, dtype=torch.float64))

    tuned = replace(own, q=near(own.q), k=near(own.k), v=near(own.v), o=near(own.o))
    made = mergelock.edit(Where(0, 3, 4, 2, 8, (0, 1)), tuned, parts="both", condition=10.0, seed=0)
    undone = toy.turned_back(made, own)
    for name in ("q", "k", "v", "o"):
        before, lock, after = (getattr(p, name) for p in (tuned, made, undone))
        assert (lock - before).norm() > 0.5 * before.norm()
        assert (after - before).norm() < 0.03 * before.norm()
    torch.testing.assert_close(undone.o[:, 3] @ undone.v[1], tuned.o[:, 3] @ tuned.v[1])


def test_siblings_average_until_one_is_locked_and_again_after_the_attack():
    base, first, second = toy.family(seed=0, learn=70, tune=40)
    found = {what: toy.accuracy(model, rows=256) for what, model in toy.scenes(base, first, second).items()}
    chance = (1 + (toy.LENGTH - 1) / toy.SYMBOLS) / toy.LENGTH  # of a symbol of the word, whichever
    for own, task in zip("AB", toy.TASKS, strict=True):
        assert found["A + B"][task] >= 0.9 * found[own][task] > 0.7
        for broken in ("A + B locked", "A locked + B", "both locked, two seeds"):
            assert found[broken][task] < chance
        for kept in ("both locked, one seed", "A + B locked, aligned to base", "A + B locked, aligned to A"):
            assert abs(found[kept][task] - found["A + B"][task]) < 0.02
        assert abs(found[f"{own} locked"][task] - found[own][task]) < 0.01


def test_models_that_normalise_queries_and_keys_take_values_alone():
    for family in NORMED:
        with pytest.raises(regard.RegardError, match="normalised after projection; parts='vo'"):
            regard.attach(tiny(family), [regard.place("mergelock")])

"""IRI [175]: the oracles of its sheet, against one row and one layer at a time."""

import pytest
import torch

import regard
from contracts.decoding import at_once, forced, prompts
from families import tiny
from regard.adapters.families import open_decoder
from regard.core.placement import Where
from regard.core.step import Step
from regard.ops.residual import iri

LAYERS, B, T, d = 5, 2, 9, 6
RATES = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.2])
OPTIONS = {
    "sources": 2, "targets": 4, "attention_strength": 0.3, "feed_forward_strength": 0.0,
    "attention_rates": RATES, "feed_forward_rates": None,
}  # fmt: skip


def made(**more):
    return [iri.write(Where(n, LAYERS, 4, 2, 8, (0, 1)), **OPTIONS | more) for n in range(LAYERS)]


def step(start, width, prompt):
    return Step(start, width, B, torch.device("cpu"), None, prompt)


def drawn(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(LAYERS)]


def ran(edits, outputs, told, part="attention"):
    return [x if edit is None else edit.run(part, x, told) for edit, x in zip(edits, outputs, strict=True)]


def test_rows_from_the_last_of_the_prompt_on_take_recorded_outputs():
    outputs = drawn()
    edited = ran(made(), outputs, step(3, T, 8))
    # Sources: layers 1 and 3. Targets: 1, 3, 2, 4, of which 1 has nothing before it.
    for layer, x in enumerate(outputs):
        for b in range(B):
            for t in range(T):
                want = x[b, t].clone()
                if layer in (2, 3, 4) and 3 + t >= 7:
                    for source in (1, 3):
                        if source < layer:
                            want += 0.3 * float(RATES[source]) * outputs[source][b, t]
                    want *= x[b, t].norm() / want.norm()
                torch.testing.assert_close(edited[layer][b, t], want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_stay(dtype):
    outputs = drawn(dtype)
    for now, was in zip(ran(made(), outputs, step(0, T, 1)), outputs, strict=True):
        assert now.dtype == dtype
        bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
        torch.testing.assert_close(now.double().norm(dim=-1), was.double().norm(dim=-1), rtol=bound, atol=0)


def test_zeros_and_sums_that_vanish_stay_finite():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert torch.equal(iri.inject(x, [(1.0, torch.tensor([[3.0, 4.0], [-1.0, -2.0]]))]), x)


@pytest.mark.parametrize("told", [step(0, T, None), step(0, T, T + 1)])
def test_rows_before_the_end_of_the_prompt_are_left_alone(told):
    outputs = drawn()
    assert all(now is was for now, was in zip(ran(made(), outputs, told), outputs, strict=True))
    assert not told.shared


def test_only_sources_are_kept_and_the_other_part_is_not_touched():
    told, outputs = step(0, T, 1), drawn()
    ran(made(), outputs, told)
    assert set(told.shared) == {("iri", "attention", 1), ("iri", "attention", 3)}
    assert all(now is was for now, was in zip(ran(made(), outputs, told, "feed_forward"), outputs, strict=True))
    both = made(feed_forward_strength=0.2, feed_forward_rates=RATES.flip(0))
    fed = ran(both, outputs, told, "feed_forward")
    want = iri.inject(outputs[2], [(0.2 * float(RATES[3]), outputs[1])])
    torch.testing.assert_close(fed[2], want)


def test_strength_0_is_neutral_and_needs_no_rates():
    assert made(attention_strength=0.0, attention_rates=None) == [None] * LAYERS


def test_sources_behind_all_targets_do_nothing_and_say_so():
    rates = torch.tensor([0.1, 0.2, 0.9])
    options = {"sources": 1, "targets": 2, "attention_rates": rates, "feed_forward_rates": rates}
    model, (ids, mask) = tiny("llama"), prompts()
    plain = at_once(model, ids, mask)
    with regard.attach(model, [regard.place("iri", **options)]) as handle, handle.prompting(9):
        assert "layer 0: iri: every source lies behind every target, nothing is injected" in handle.explain()
        torch.testing.assert_close(at_once(model, ids, mask)[mask.bool()], plain[mask.bool()])


def test_a_served_model_tells_its_plan_and_chunks_agree_with_one_forward():
    rates = torch.tensor([0.8, 0.2, 0.5])
    options = {"sources": 2, "targets": 3, "attention_rates": rates, "feed_forward_rates": rates}
    model, (ids, mask) = tiny("gemma2"), prompts()
    with regard.attach(model, [regard.place("iri", **options)]) as handle, handle.prompting(15):
        assert (
            "layer 2: window 8; iri: attention takes that of layer 0, feed-forward takes that of layer 0"
            in handle.explain()
        )
        once = at_once(model, ids, mask)
        torch.testing.assert_close(forced(model, ids, mask, [6, 14, 15, 18])[mask.bool()], once[mask.bool()])
    plain = at_once(model, ids, mask)
    changed = (once - plain).abs().amax(-1) > 1e-5
    assert changed[:, 14:].all()
    assert not (changed & mask.bool())[:, :14].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_rates": None}, r"attention_rates of shape \[layers\] = \[5\], got nothing"),
        ({"attention_rates": torch.ones(4)}, r"got \[4\]; regard.calibrate.iri finds them"),
        ({"attention_rates": torch.full((5,), torch.inf)}, "attention_rates that are not finite"),
    ],
)
def test_bad_rates_are_named(change, message):
    with pytest.raises(regard.RegardError, match=message):
        made(**change)


def test_a_strength_out_of_range_and_a_choice_of_layers_are_refused():
    rates = torch.ones(3)
    with pytest.raises(regard.RegardError, match=r"'attention_strength' of 'iri' must lie in \[0.0, 1.0\]"):
        regard.attach(tiny("llama"), [regard.place("iri", attention_strength=1.5)])
    some = regard.place("iri", layers=(0, 1), attention_rates=rates, feed_forward_rates=rates)
    with pytest.raises(regard.RegardError, match="decides over the whole model"):
        regard.attach(tiny("llama"), [some])


def test_a_family_known_by_structure_alone_is_refused(monkeypatch):
    from regard.adapters import families

    monkeypatch.delitem(families.FAMILIES, "llama")
    model = tiny("llama")
    rates = torch.rand(open_decoder(model).layers)
    with pytest.raises(regard.RegardError, match="where the feed forward of family llama"):
        regard.attach(model, [regard.place("iri", attention_rates=rates, feed_forward_rates=rates)])

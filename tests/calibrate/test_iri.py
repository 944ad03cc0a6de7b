"""Causal tracing on text: what restores the answer, on a toy where that is known, and its oracles."""

import pytest
import torch

import regard
from calibrate import toys
from contracts.snapshot import snapshot
from families import VOCABULARY, tiny
from regard.adapters.families import open_decoder
from regard.calibrate import iri
from regard.calibrate.iri import Sample

# Tokens 0..7 are objects, 8..15 the answers to them, the others filler.
OBJECTS, COPIES, COPIED = 8, 1, 4


def toy():
    """Four layers: layer 1 copies which object stands in the prompt; the others write a constant."""
    d = 24 + OBJECTS + 4
    unit = torch.eye(d)
    copied, idle = unit[24 : 24 + OBJECTS], unit[24 + OBJECTS]
    model = toys.blank(4, 24, d)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :24] = torch.eye(24)
        model.model.embed_tokens.weight[:, -1] = 1
        model.lm_head.weight[OBJECTS : 2 * OBJECTS] = copied
    objects = unit[:OBJECTS]
    for layer in range(4):
        if layer == COPIES:
            toys.plant(model, layer, 0, seek=objects.sum(0), sight=1.5, read=0.3 * objects, write=copied.T)
        else:
            toys.plant(model, layer, 0, seek=0 * idle, sight=0.0, read=0.1 * unit[-1:], write=idle[:, None])
    return model


def asked(count=6):
    drawn = torch.Generator().manual_seed(0)
    for number in range(count):
        prompt = torch.randint(2 * OBJECTS, 24, (10,), generator=drawn)
        prompt[COPIED] = number
        yield Sample(prompt, OBJECTS + number, (COPIED, COPIED + 1))


def test_recovery_peaks_where_the_object_is_copied_and_injection_raises_the_right_logit():
    model, told, samples = toy(), [], list(asked())
    before = snapshot(model)
    found = iri.trace(model, samples, noise=6.0, progress=lambda *done: told.append(done))
    assert snapshot(model) == before
    assert found.used + found.skipped == 6
    assert found.used >= 4
    assert told == [(n + 1, 6) for n in range(6)]
    assert found.attention[COPIES] > 0.8
    others = torch.cat((found.attention[torch.arange(4) != COPIES], found.feed_forward))
    assert others.abs().max() < 0.2
    rates = iri.fit(model, torch.zeros(0), samples=samples, noise=6.0)
    torch.testing.assert_close(rates["attention_rates"].double(), found.attention, atol=1e-6, rtol=1e-6)
    ids = torch.stack([sample.prompt for sample in samples])
    right = torch.tensor([[sample.answer] for sample in samples])
    with torch.no_grad():
        plain = model(input_ids=ids).logits[:, -1]
        injected = [regard.place("iri", sources=1, targets=4, **rates)]
        with regard.attach(model, injected) as handle, handle.prompting(ids.shape[1]):
            raised = model(input_ids=ids).logits[:, -1]
    assert (raised.gather(1, right) > plain.gather(1, right) + 0.01).all()
    assert (raised.log_softmax(-1).gather(1, right) > plain.log_softmax(-1).gather(1, right)).all()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral", "qwen2_5_vl"])
def test_patching_everything_restores_the_answer_and_patching_nothing_does_not(family):
    model = tiny(family).double() if family != "mixtral" else tiny(family)
    decoder = open_decoder(model)
    sample = Sample(torch.randint(2, 80, (14,), generator=torch.Generator().manual_seed(2)), 7, (5, 8))
    patches = torch.zeros(4, 2, decoder.layers, dtype=torch.bool)
    patches[1] = True
    patches[2, 0, 1] = True
    patches[3] = patches[2]
    clean, found = iri.probabilities(model, decoder, sample, patches, 3.0, torch.Generator().manual_seed(0), batch=3)
    with torch.no_grad():
        plain = model(input_ids=sample.prompt[None]).logits[0, -1].double().softmax(-1)[7]
    assert clean == pytest.approx(float(plain), rel=1e-5)
    assert float(found[1]) == pytest.approx(clean, rel=1e-4)
    assert abs(float(found[0]) - clean) > 1e-3 * clean
    assert len({round(float(x), 12) for x in found[:3]}) == 3
    assert float(found[3]) == pytest.approx(float(found[2]), rel=1e-5)


def test_samples_that_do_not_mind_the_noise_are_skipped_and_counted():
    model, samples = toy(), list(asked(3))
    # Filler is not looked at.
    idle = Sample(samples[0].prompt, samples[0].answer, (7, 8))
    found = iri.trace(model, [idle, *samples], noise=6.0)
    assert found.skipped >= 1
    with pytest.raises(regard.RegardError, match="noise 6 changes the probability of none of the 2 answers"):
        iri.trace(model, [idle, idle], noise=6.0)


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (8, 10), (9, 12)])
def test_spans_without_tokens_or_on_the_last_one_are_named(span):
    first = next(asked())
    with pytest.raises(regard.RegardError, match="sample 1 has span"):
        iri.trace(toy(), [first, Sample(first.prompt, first.answer, span)])


def test_drawn_samples_ask_for_a_token_that_stands_once_in_the_prompt():
    tokens = torch.randint(2, VOCABULARY - 6, (400,), generator=torch.Generator().manual_seed(3))
    drawn = iri.recurrences(tokens, 12, 40, 3)
    assert len(drawn) == 12
    for sample in drawn:
        start, stop = sample.span
        assert stop - start == 3
        assert (sample.prompt == sample.answer).nonzero().tolist() == [[stop - 1]]
        at = (tokens.unfold(0, 41, 1)[:, :40] == sample.prompt).all(1).nonzero()[0, 0]
        assert int(tokens[at + 40]) == sample.answer
    with pytest.raises(regard.RegardError, match="need more text than 40 tokens"):
        iri.recurrences(tokens[:40], 12, 40)
    with pytest.raises(regard.RegardError, match="no token of the text recurs"):
        iri.recurrences(torch.arange(200), 12, 40)


def test_text_alone_gives_a_recipe():
    model = tiny("qwen3")
    with torch.no_grad():
        # A random model hardly knows any next token: surer, so that noise can cost an answer something.
        model.lm_head.weight.mul_(8)
    tokens = torch.randint(2, VOCABULARY - 6, (400,), generator=torch.Generator().manual_seed(3))
    rates = iri.fit(model, tokens, count=60, length=24)
    assert {name: tuple(x.shape) for name, x in rates.items()} == {"attention_rates": (3,), "feed_forward_rates": (3,)}
    with regard.attach(model, [regard.place("iri", sources=2, **rates)]) as handle:
        assert "iri: " in handle.explain()

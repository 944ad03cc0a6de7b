"""Causal tracing: its oracles on random models, and a toy where one layer's attention copies the answer."""

import pytest
import torch

from calibrate import toys
from contracts.snapshot import snapshot
from families import tiny
from regard import observe
from regard.core.errors import RegardError

OBJECTS, COPIES, COPIED, T = 8, 1, 4, 10


def changed():
    """Two prompts and the same with another token at place 4, the second padded by 2."""
    clean = torch.randint(2, 90, (2, T), generator=torch.Generator().manual_seed(0))
    other = clean.clone()
    other[:, 4] = 91
    mask = torch.ones_like(clean)
    mask[1, :2] = 0
    return {"input_ids": clean, "attention_mask": mask}, {"input_ids": other, "attention_mask": mask}, mask.bool()


def answers(model, clean, other):
    """Tokens that the change makes less likely."""
    with torch.no_grad():
        logits = [model(**x).logits[:, -1].softmax(-1) for x in (clean, other)]
    return (logits[0] - logits[1]).argmax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_patches_restore_what_they_must(family):
    model, (clean, other, real) = tiny(family), changed()
    right = answers(model, clean, other)
    before = snapshot(model)
    last = torch.zeros(1, T, dtype=torch.bool)
    last[0, -1] = True
    place = torch.zeros(1, T, dtype=torch.bool)
    place[0, 4] = True
    early = torch.zeros(1, T, dtype=torch.bool)
    early[0, 2:4] = True
    told = []
    groups = {"all": real, "last": last, "place": place, "early": early}
    found = observe.trace(model, clean, other, right, groups=groups, batch=5, progress=lambda *x: told.append(x))
    assert snapshot(model) == before
    assert found.rates.shape == (3, 3, 4)
    assert told[-1] == (36, 36)
    stream = found.rates[found.parts.index("stream")]
    torch.testing.assert_close(stream[:, 0], torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(stream[-1, 1], torch.tensor(1.0, dtype=torch.float64), atol=1e-4, rtol=0)
    assert found.rates[..., 3].abs().max() < 1e-4, "tokens before the change are what they were"
    assert (found.clean - found.corrupted).min() > 0
    alone = observe.trace(model, clean, other, right, groups={"last": last}, parts=["feed_forward"], batch=1)
    torch.testing.assert_close(alone.rates[0, :, 0], found.rates[1, :, 1], atol=1e-4, rtol=1e-4)


def test_recovery_peaks_where_the_object_is_copied():
    d = 24 + OBJECTS + 4
    unit = torch.eye(d)
    model = toys.blank(4, 24, d)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :24] = torch.eye(24)
        model.model.embed_tokens.weight[:, -1] = 1
        model.lm_head.weight[OBJECTS : 2 * OBJECTS] = 3 * unit[24 : 24 + OBJECTS]
    toys.plant(model, COPIES, 0, seek=unit[:OBJECTS].sum(0), sight=1.5, read=unit[:OBJECTS],
               write=unit[24 : 24 + OBJECTS].T)  # fmt: skip
    clean = torch.randint(2 * OBJECTS, 24, (3, T), generator=torch.Generator().manual_seed(0))
    clean[:, COPIED] = torch.arange(3)
    other = clean.clone()
    other[:, COPIED] = torch.tensor([5, 6, 7])
    groups = {}
    for name, at in {"object": COPIED, "filler": 1, "last": T - 1}.items():
        groups[name] = torch.arange(T)[None] == at
    found = observe.trace(model, clean, other, OBJECTS + torch.arange(3), groups=groups)
    attention, _, stream = found.rates
    assert attention[COPIES, 2] > 0.8
    rest = attention.clone()
    rest[COPIES, 2] = 0
    assert rest.abs().max() < 0.2
    # Before the copy the object's own place carries the answer, from the copy on the last token does.
    assert stream[0].tolist() == pytest.approx([1, 0, 0], abs=1e-3)
    assert stream[COPIES:, 2].min() > 0.99
    assert stream[COPIES:, :2].abs().max() < 1e-3
    assert (found.used, found.skipped) == (3, 0)


def test_bad_input():
    model, (clean, other, real) = tiny("llama"), changed()
    before = snapshot(model)
    cases = [
        ({"groups": {"none": torch.zeros(1, T, dtype=torch.bool)}}, "group 'none' has no token in row 0"),
        ({"groups": {"pad": torch.ones(1, T, dtype=torch.bool)}}, r"group 'pad' lies over padding: row 1, arrival 0"),
        ({"groups": {"x": torch.ones(1, 3, dtype=torch.bool)}}, r"group 'x' must be bool \[1 or 2, 10\]"),
        ({"groups": {"all": real}, "parts": ["atention"]}, "Did you mean 'attention'"),
    ]
    for options, words in cases:
        with pytest.raises(RegardError, match=words):
            observe.trace(model, clean, other, 5, **options)
    with pytest.raises(RegardError, match="changes the probability of none of the 2 answers"):
        observe.trace(model, clean, clean, 5, groups={"all": real})
    with pytest.raises(RegardError, match="one shape and padding"):
        observe.trace(model, clean["input_ids"], other, 5, groups={"all": real})
    with pytest.raises(RegardError, match="no pixel_values to put noise on; inputs are input_ids"):
        observe.noised(clean)
    assert snapshot(model) == before


def test_noise_is_measured_in_deviations_of_the_pixels():
    pixels = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 0.2 + 1
    found = observe.noised({"pixel_values": pixels, "other": 1}, scale=2.0)
    assert found["other"] == 1
    assert float((found["pixel_values"] - pixels).std()) == pytest.approx(0.4, rel=0.03)

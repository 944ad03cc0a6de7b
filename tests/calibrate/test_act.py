"""The head search of ACT: a planted harmful head is found among helpful and idle ones."""

import pytest
import torch

import regard
from calibrate import toys
from contracts.snapshot import snapshot
from families import VOCABULARY, tiny
from regard.calibrate import act
from regard.measure.text import Window

# Tokens 0..12 follow one another in a circle; 13 and 14 are always wrong; 15 is the sink.
CIRCLE, WRONG, DISTRACTED, SINK = 13, 14, 13, 15
HARMFUL, HELPFUL, IDLE = (1, 2), (0, 1), (0, 3)
CONTEXT, ANSWERS = 24, 8
# Where attention is uniform the first keys are above 0.1 too, in so short a text.
THETA = 0.3


def toy():
    """Two layers. One head writes the wrong answer where it finds the sink, one removes a distraction there."""
    d = 20
    unit = torch.eye(d)
    wrong, distracted = unit[16], unit[17]
    model = toys.blank(2, 16, d)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, :16] = torch.eye(16)
        embedding[:, 17] = 1
        # Large, so that what heads write hardly changes the norm, which would change all logits.
        embedding[:, -1] = 8
        for token in range(CIRCLE):
            model.lm_head.weight[(token + 1) % CIRCLE, token] = 20
        model.lm_head.weight[WRONG] = 20 * wrong
        model.lm_head.weight[DISTRACTED] = 20 * 1.6 * distracted
    for place, write in ((HARMFUL, 1.2 * wrong), (HELPFUL, -0.6 * distracted), (IDLE, 0 * wrong)):
        toys.plant(model, *place, seek=unit[SINK], sight=3.5, read=1.8 * unit[SINK][None], write=write[:, None])
    return model


def text(windows=2):
    drawn, pieces = torch.Generator().manual_seed(0), []
    for _ in range(windows):
        context = torch.randint(0, CIRCLE, (CONTEXT,), generator=drawn)
        context[6] = SINK
        pieces += [context, (context[-1] + 1 + torch.arange(ANSWERS)) % CIRCLE]
    return torch.cat(pieces)


@torch.no_grad()
def accuracy(model, mask):
    held = text().view(2, -1)
    with regard.attach(model, [regard.place("act", heads_mask=mask, theta=THETA)]) as handle, handle.prompting(CONTEXT):
        found = model(input_ids=held).logits.argmax(-1)
    return float((found[:, CONTEXT - 1 : -1] == held[:, CONTEXT:]).float().mean())


def test_the_harmful_head_is_found_and_its_calibration_raises_accuracy():
    model, told = toy(), []
    before = snapshot(model)
    found = act.fit(
        model, text(), theta=THETA, context=CONTEXT, continuation=ANSWERS, progress=lambda *done: told.append(done)
    )["heads_mask"]
    assert [tuple(place) for place in found.nonzero().tolist()] == [HARMFUL]
    # Heads without a sink are not tried.
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert snapshot(model) == before
    assert accuracy(model, torch.zeros(2, 4)) == 0
    assert accuracy(model, found) == 1
    assert accuracy(model, torch.ones(2, 4)) < 1


def test_cost_is_bounded_and_own_tasks_take_the_place_of_text():
    model, told = toy(), []
    options = {"limit": 1, "theta": THETA, "progress": lambda *done: told.append(done)}
    pieces = text().view(2, -1)
    tasks = [Window(0, piece[:CONTEXT], piece[CONTEXT:]) for piece in pieces]
    found = act.fit(model, text()[:0], tasks=tasks, layers=[1], **options)["heads_mask"]
    assert told == [(1, 1)]
    assert found.nonzero().tolist() == [list(HARMFUL)]
    assert not act.fit(model, text(), tasks=tasks, layers=[0], limit=None, theta=THETA)["heads_mask"].any()
    assert not act.fit(model, text(), tasks=tasks, margin=100.0, theta=THETA)["heads_mask"].any()


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_attention_on_sinks_is_that_of_the_models_own_maps(family):
    """In sliding layers too: the mean is over the rows that can see a key."""
    model = tiny(family)
    model.set_attn_implementation("eager")
    ids = torch.randint(2, VOCABULARY - 6, (30,), generator=torch.Generator().manual_seed(0))
    found = act.sink_mass(model, ids, 0.12, None)
    with torch.no_grad():
        maps = model(input_ids=ids[None], output_attentions=True).attentions
    for layer, A in enumerate(maps):
        window = 8 if model.config.layer_types[layer] == "sliding_attention" else 30
        rows = torch.minimum(30 - torch.arange(30), torch.tensor(window))
        sinks = A[0].sum(1) / rows > 0.12
        sinks[:, 0] = False
        torch.testing.assert_close(found[layer], (A[0].sum(1) * sinks).sum(-1), atol=1e-3, rtol=1e-3)
    assert found.any()


def test_bad_input_is_named():
    with pytest.raises(regard.RegardError, match="layer 3 is out of range; this model has 3"):
        act.fit(tiny("llama"), text(), layers=[3], context=24, continuation=8)
    with pytest.raises(regard.RegardError, match="the text has 64 tokens, too few for one window"):
        act.fit(tiny("llama"), text())

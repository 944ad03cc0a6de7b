"""ADSC against its formula, and against a masked full forward."""

import pytest
import torch

import regard
from contracts.decoding import at_once, forced, prompts
from contracts.replay import everything_kept
from families import tiny
from regard.core.errors import RegardError
from regard.core.step import Step
from regard.ops.tokens import adsc


def step(start=0, width=20, prompt=20, padding=None, marks=None, batch=1):
    return Step(start, width, batch, torch.device("cpu"), padding, prompt, marks)


def test_rows_a_layer_follow_the_formula():
    assert adsc.strides(32, None, "2") == [1] * 6 + [2] * 6 + [4] * 8 + [8] * 12
    assert adsc.strides(4, "1,3", "2,3") == [1, 2, 2, 6]
    # The sheet's arithmetic: 576 span rows and 64 others over 32 layers keep 45.2 % of the rows.
    held = sum(64 + -(-576 // stride) for stride in adsc.strides(32, None, "2"))
    assert abs(1 - held / (32 * 640) - 0.548) < 0.001


def test_the_span_lies_between_start_and_tail_of_every_row():
    index = adsc.places(step(padding=torch.tensor([3, 0]), batch=2), start=2, tail=4)
    for row, pad in enumerate([3, 0]):
        for arrival in range(20):
            position = arrival - pad
            inside = position >= 2 and arrival < 16
            assert index[row, arrival] == (position - 2 if inside else -1)


def test_chunks_agree_with_one_forward():
    whole = adsc.places(step(), start=2, tail=4)
    parts = [adsc.places(step(start, 5), start=2, tail=4) for start in (0, 5, 10)]
    assert torch.equal(torch.cat(parts, 1), whole[:, :15])
    assert adsc.places(step(16, 4), start=2, tail=4) is None


def test_marks_are_the_span_where_there_are_any():
    marks = torch.zeros(2, 12, dtype=torch.bool)
    marks[0, 3:9] = True
    marks[1, [1, 4, 6, 7, 10]] = True
    index = adsc.places(step(marks=marks, batch=2), start=0, tail=1)
    assert index[1].tolist() == [-1, 0, -1, -1, 1, -1, 2, 3, -1, -1, 4, -1, *[-1] * 8]
    late = adsc.places(step(5, 10, marks=marks, batch=2), start=0, tail=1)
    assert torch.equal(late, index[:, 5:15])
    assert adsc.places(step(12, 3, marks=marks, batch=2), start=0, tail=1) is None


@pytest.mark.parametrize("cuts", [[], [21], [5, 6, 19, 24]])
def test_a_span_marked_differently_in_every_row_equals_its_definition(cuts):
    model = tiny("qwen2").double()
    ids, mask = prompts(rows=3, length=30, padding=7)
    marks = torch.zeros(3, 18, dtype=torch.bool)
    marks[0, 8:16] = marks[1, 2:8] = marks[2, ::2] = True
    recipe = regard.Recipe([regard.place("adsc", at="1,2", factors="2,2")])
    if not cuts:
        cuts = [29]
    with regard.attach(model, recipe) as handle, handle.prompting(21), handle.marking(marks):
        real = forced(model, ids, mask, cuts)
    with everything_kept(), regard.attach(model, recipe) as handle, handle.prompting(21), handle.marking(marks):
        full = at_once(model, ids, mask)
    torch.testing.assert_close(real[mask.bool()], full[mask.bool()], atol=1e-9, rtol=1e-9)


def test_the_cache_holds_the_rows_alive_in_each_layer():
    model = tiny("llama")
    ids, mask = prompts(length=30, padding=0)
    recipe = regard.Recipe([regard.place("adsc", at="1,2", factors="2", start=2, tail=4)])
    with regard.attach(model, recipe) as handle, handle.prompting(30):
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        held = [layer.store.state["arrivals"].shape[1] for layer in list(cache.layers)[1:]]
        whole = cache.layers[0].keys.shape[2]
    assert (whole, held) == (30, [6 + 12, 6 + 6])


def test_embeddings_of_dropped_tokens_learn_through_the_layers_before():
    model = tiny("llama")
    ids, mask = prompts(rows=1, length=24, padding=0)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    recipe = regard.Recipe([regard.place("adsc", at="1", factors="3", start=2, tail=4)])
    with regard.attach(model, recipe) as handle, handle.prompting(24):
        model(inputs_embeds=embedded, attention_mask=mask).logits[:, -1].logsumexp(-1).sum().backward()
    assert bool((embedded.grad.abs().sum(-1) > 0).all())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"at": "2,1"}, "increase"),
        ({"at": "1,9"}, "layers 0 to 2"),
        ({"at": "one"}, "whole numbers"),
        ({"factors": "2,2"}, "2 factors '2,2' for 3 layers"),
        ({"factors": "0"}, "1 or more"),
        ({"tail": 0}, "tail"),
    ],
)
def test_what_cannot_be_thinned_out_is_refused(options, said):
    with pytest.raises(RegardError, match=said):
        regard.attach(tiny("llama"), regard.Recipe([regard.place("adsc", **options)]))


@pytest.mark.parametrize(
    ("span", "said"),
    [((0, 24), "whole prompt of 24"), ((3, 5), "span of 2"), (torch.ones(3, 9, dtype=torch.bool), "marks of 3 rows")],
)
def test_a_span_that_cannot_be_served_is_refused_before_anything_runs(span, said):
    model = tiny("llama")
    ids, mask = prompts(length=24, padding=0)
    recipe = regard.Recipe([regard.place("adsc", at="1,2", factors="2")])
    with regard.attach(model, recipe) as handle, handle.prompting(24):
        with handle.marking(span), pytest.raises(RegardError, match=said):
            at_once(model, ids, mask)
        assert handle.nbytes == 0
        with pytest.raises(RegardError, match="start < stop"), handle.marking((5, 5)):
            pass


def test_a_span_in_the_padding_is_refused():
    model = tiny("llama")
    ids, mask = prompts(length=24, padding=6)
    marks = torch.zeros(2, 24, dtype=torch.bool)
    marks[:, 3:12] = True
    recipe = regard.Recipe([regard.place("adsc", at="1", factors="2")])
    refused = pytest.raises(RegardError, match="padding")
    with regard.attach(model, recipe) as handle, handle.prompting(24), handle.marking(marks), refused:
        at_once(model, ids, mask)


def test_marks_follow_rows_that_generate_repeats():
    model = tiny("llama").double()
    ids, mask = prompts(length=21, padding=4)
    marks = torch.zeros(2, 21, dtype=torch.bool)
    marks[0, 8:16] = marks[1, 2:12] = True
    recipe = regard.Recipe([regard.place("adsc", at="1,2", factors="2")])
    how = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    with regard.attach(model, recipe) as handle:
        with handle.marking(marks):
            together = model.generate(ids, attention_mask=mask, **how)
        for row, pad in enumerate([4, 0]):
            with handle.marking(marks[row : row + 1, pad:]):
                alone = model.generate(ids[row : row + 1, pad:], attention_mask=mask[row : row + 1, pad:], **how)
            assert torch.equal(together[row, pad:], alone[0])

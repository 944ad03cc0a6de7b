"""LocoRE [112]: the weights of the last tokens of the answer times 1 + beta, renormalised."""

import pytest
import torch

import regard
from families import tiny
from regard.core.placement import Where
from regard.ops.scores import locore
from steered import drawn, maps, scores, softmax

WHERE = Where(1, 3, 4, 2, 8, (0, 1))
N, PROMPT = 24, 15


def loop(weights, prompt, window, beta, heads=range(4), pad=(0, 0)):
    found = weights.clone()
    for b in range(len(weights)):
        for h in heads:
            for i in range(prompt, N):
                for j in range(max(prompt, i - window + 1), i + 1):
                    found[b, h, i, j] *= 1 + beta
                found[b, h, i] /= found[b, h, i].sum()
    return found


@pytest.mark.parametrize("cuts", [(), (4, 17), (PROMPT, *range(16, N))])
@pytest.mark.parametrize("padding", [None, torch.tensor([6, 0])], ids=["whole", "padded"])
def test_rows_of_the_answer_are_the_loop_and_no_other_row_changes(cuts, padding):
    q, k = drawn()
    edit = locore.rescore(WHERE, window=3, beta=0.5)
    found = maps(q, k, cuts, prompt=PROMPT, padding=padding, rescore=(edit,))
    want = loop(softmax(scores(q, k, padding=padding)), PROMPT, 3, 0.5)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-9)
    one = locore.rescore(Where(1, 3, 4, 2, 8, (1,)), window=3, beta=0.5)
    found = maps(q, k, cuts, prompt=PROMPT, rescore=(one,))
    torch.testing.assert_close(found, loop(softmax(scores(q, k)), PROMPT, 3, 0.5, (2, 3)), atol=1e-12, rtol=1e-9)


def test_beta_0_and_a_prompt_that_nobody_ended_change_nothing():
    assert locore.rescore(WHERE, window=3, beta=0.0) is None
    q, k = drawn()
    edit = locore.rescore(WHERE, window=3, beta=0.5)
    assert torch.equal(maps(q, k, rescore=(edit,)), maps(q, k))
    assert torch.equal(maps(q, k, prompt=N, rescore=(edit,)), maps(q, k))


def test_options_out_of_bounds_are_named():
    for options, words in (({"beta": -0.1}, "'beta' of 'locore'"), ({"window": 0}, "'window' of 'locore'")):
        with pytest.raises(regard.RegardError, match=words):
            regard.attach(tiny("llama"), [regard.place("locore", **options)])


def test_two_edits_of_how_keys_are_weighed_stand_on_different_layers():
    both = [regard.place("locore"), regard.place("act")]
    with pytest.raises(regard.RegardError, match="'locore' and 'act' both decide how the keys of layer 0 are read"):
        regard.attach(tiny("llama"), both)
    regard.attach(tiny("llama"), [regard.place("locore", layers=(0,)), regard.place("act", layers=(1,))]).detach()

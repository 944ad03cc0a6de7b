"""Any two mechanisms that can stand together, on one layer each, equal their definition together."""

import pytest
import torch

import regard
from contracts.decoding import at_once, forced, prompts
from contracts.replay import everything_kept, record, replay
from contracts.subjects import MECHANISMS, example
from contracts.test_mechanisms import PROMPT
from families import tiny
from regard.adapters.families import open_decoder
from regard.recipes.legal import refusal


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("stem", MECHANISMS[:-1])
def test_two_mechanisms_together_equal_their_definition(stem, family):
    model = tiny(family).double()
    decoder = open_decoder(model)
    ids, mask = prompts(length=36)
    for other in MECHANISMS[MECHANISMS.index(stem) + 1 :]:
        placed = [*example(stem, decoder).placements, *example(other, decoder).placements]
        if refusal(placed, decoder) is not None:
            continue
        tape = {}
        with regard.attach(model, placed) as handle, handle.prompting(PROMPT):
            record(handle, tape)
            cached = forced(model, ids, mask, [2, 6, 16, 21, 30])
        with everything_kept(), regard.attach(model, placed) as handle, handle.prompting(PROMPT):
            replay(handle, tape)
            full = at_once(model, ids, mask)
        real = mask.bool()
        torch.testing.assert_close(cached[real], full[real], atol=1e-6, rtol=1e-6, msg=lambda m, o=other: f"{o}: {m}")

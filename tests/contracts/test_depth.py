"""Depth mechanisms together, and beside mechanisms of the cache: each run against its replay."""

import pytest
import torch

import regard
from contracts.decoding import at_once, forced, generated, prompts
from contracts.replay import everything_kept, record, replay
from families import tiny

PROMPT = 21
GATES = torch.tensor([[0.9, 0.1], [0.5, 0.6], [0.0, 1.0]])
PARTS = {
    "unified_skip": ("unified_skip", {"speed_up": 1.5}),
    "ffn_skip": ("ffn_skip", {"first": 0, "last": 0, "warmup": 2, "threshold": 0.8, "jump": 2}),
    "streaming": ("streaming", {"sink": 2, "window": 5}),
    "saw_int4": ("saw_int4", {"key_bits": 8, "value_bits": 4}),
    "duo": ("duo", {"gates": GATES, "sparsity": 0.5, "sink": 2, "recent": 5}),
}
TOGETHER = [
    ("unified_skip", "ffn_skip"),
    ("unified_skip", "streaming"),
    ("unified_skip", "saw_int4"),
    ("unified_skip", "duo"),
    ("ffn_skip", "streaming"),
    ("ffn_skip", "saw_int4"),
    ("ffn_skip", "duo"),
    ("unified_skip", "ffn_skip", "duo"),
]


def recipe(parts):
    return [regard.place(stem, **options) for stem, options in map(PARTS.__getitem__, parts)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("parts", TOGETHER, ids="+".join)
def test_combinations_replay_as_one_full_forward(parts, family):
    model = tiny(family).double()
    ids, mask = prompts(length=36)
    for cuts in (list(range(21, 35)), [1, 2, 6, 16, 24, 30]):
        tape = {}
        with regard.attach(model, recipe(parts)) as handle, handle.prompting(PROMPT):
            record(handle, tape)
            cached = forced(model, ids, mask, cuts)
        with everything_kept(), regard.attach(model, recipe(parts)) as handle, handle.prompting(PROMPT):
            replay(handle, tape)
            full = at_once(model, ids, mask)
        real = mask.bool()
        torch.testing.assert_close(cached[real], full[real], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("parts", TOGETHER, ids="+".join)
def test_combinations_generate_as_their_definition(parts):
    model = tiny("llama").double()
    for way in ("greedy", "beams", "chunked prefill", "prompt lookup"):
        with regard.attach(model, recipe(parts)):
            real = generated(model, way)
        with everything_kept(), regard.attach(model, recipe(parts)):
            assert torch.equal(generated(model, way), real), way


def test_each_part_of_a_combination_shows():
    """A combination that left one of its parts out would pass every other test here."""
    model = tiny("llama").double()
    ids, mask = prompts(length=36)

    def run(parts):
        with regard.attach(model, recipe(parts)) as handle, handle.prompting(PROMPT):
            return forced(model, ids, mask, [16, PROMPT, 28])

    for parts in TOGETHER:
        for left_out in parts:
            assert not torch.allclose(run(parts), run([part for part in parts if part != left_out]), atol=1e-3)

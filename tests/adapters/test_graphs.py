"""Forwards of one token in fixed shapes against the others; tests/cuda/test_graphs.py replays them."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache

import regard
from contracts.decoding import GENERATE, generated, prompts
from families import tiny
from regard.adapters import graphs
from regard.core.pattern import Pattern
from regard.kernels.graphs import Replay
from regard.ops import decode
from regard.ops.cache import saw_int4
from regard.primitives import codes

GATES = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.6]])
DUO = regard.place("duo", gates=GATES, sparsity=0.5, sink=2, recent=5)
CODES = regard.place("saw_int4", key_bits=8, value_bits=4)
RECIPES = {
    "dense": [],
    "codes": [CODES],
    "duo": [DUO],
    "duo in codes": [DUO, CODES],
    "ring": [regard.place("streaming", sink=3, window=4)],
    "one layer": [regard.place("streaming", layers=[1], sink=0, window=1)],
}


class Traced(Replay):
    """Replays by running again the tensor operations of one call: all that Python did is as it was then."""

    def _watched(self, *inputs):
        return self.work(*inputs)

    def _captured(self, *inputs):
        self.inputs = [x.clone() for x in inputs]
        self.out = torch.empty(0)
        done = make_fx(self.work)(*self.inputs)
        return SimpleNamespace(replay=lambda: setattr(self, "out", done(*self.inputs)))


@pytest.fixture
def traced(monkeypatch):
    """Replays on a CPU; the codes' look at their numbers, which only a CPU takes, is left out."""
    monkeypatch.setattr("regard.kernels.graphs.refuses", lambda device: None)
    monkeypatch.setattr(graphs, "Replay", Traced)
    monkeypatch.setattr(graphs, "own_stream", lambda device, kept: nullcontext(nullcontext()))
    monkeypatch.setattr(saw_int4, "math", SimpleNamespace(isfinite=lambda number: True))


@pytest.fixture(scope="module")
def llama():
    return tiny("llama").double()


def answers(model, recipe, padding=4, tokens=24, length=21, **options):
    """Logits `[B, n, V]` and tokens of `generate`, and what `explain` says of single tokens."""
    ids, mask = (x[:, :length] for x in prompts(padding=padding))
    with regard.attach(model, recipe, **options) as handle:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(out.logits, 1), out.sequences, handle.explain().splitlines()[1]


def close(found, wanted, atol=1e-9):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize(("recipe", "padding"), [("dense", 0), ("duo in codes", 4)])
def test_what_one_step_recorded_gives_later_ones_too(llama, traced, recipe, padding):
    """Most new tokens come from operations recorded at an earlier one."""
    wanted, tokens, _ = answers(llama, RECIPES[recipe], padding)
    found, mine, told = answers(llama, RECIPES[recipe], padding, graphs=True)
    assert "replayed as a CUDA graph; begun 1 times" in told
    assert torch.equal(tokens, mine)
    close(found, wanted)


@pytest.mark.parametrize("length", [6, 21])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fixed_steps_are_the_steps(llama, monkeypatch, recipe, length):
    """Prompts shorter than what rings remember too; stores grow on the way."""
    monkeypatch.setattr(graphs, "SPARE", 8)
    wanted, tokens, _ = answers(llama, RECIPES[recipe], 2, length=length)
    found, mine, told = answers(llama, RECIPES[recipe], 2, length=length, graphs=True)
    assert "launched every time (graphs are captured on CUDA devices, not on cpu)" in told
    assert ("a store was full" in told) == (recipe != "ring")
    assert torch.equal(tokens, mine)
    close(found, wanted)


@pytest.mark.parametrize("way", GENERATE)
def test_every_way_of_generating(llama, way):
    with regard.attach(llama, RECIPES["duo in codes"]):
        wanted = generated(llama, way)
    with regard.attach(llama, RECIPES["duo in codes"], graphs=True):
        assert torch.equal(generated(llama, way), wanted)


def test_layers_with_windows_of_their_own():
    model = tiny("gemma2").double()
    wanted, tokens, _ = answers(model, [], 0, tokens=12)
    found, mine, told = answers(model, [], 0, tokens=12, graphs=True)
    assert "in fixed steps" in told
    assert torch.equal(tokens, mine)
    # Its own softmax is in float32.
    close(found, wanted, 1e-5)


@torch.no_grad()
def fed(model, ids, pieces):
    """Logits of `ids` in pieces; a negative piece is cropped."""
    cache, logits, at = DynamicCache(config=model.config), [], 0
    for piece in pieces:
        if piece == "record":
            cache.activate_past_recording()
        elif piece == "swap":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif piece < 0:
            cache.crop(piece)
            at += piece
        else:
            places = torch.arange(at, at + piece).expand(2, -1)
            given = {"position_ids": places, "past_key_values": cache, "use_cache": True}
            logits.append(model(input_ids=ids[:, at : at + piece], **given).logits)
            at += piece
    return torch.cat(logits, 1)


@pytest.mark.parametrize("recipe", ["dense", "duo in codes"])
def test_other_forwards_crops_and_reordered_rows_in_between(llama, recipe):
    ids, _ = prompts(length=40, padding=0)
    pieces = [12, 1, 1, 3, 1, 1, "swap", 1, 1, "record", 1, 1, -2, 1, 1, 5, 1]
    with regard.attach(llama, RECIPES[recipe]):
        wanted = fed(llama, ids, pieces)
    with regard.attach(llama, RECIPES[recipe], graphs=True) as handle:
        close(fed(llama, ids, pieces), wanted)
        assert "stores were changed otherwise" in handle.explain()
        assert ("records what a crop may bring back" in handle.explain()) == (recipe != "dense")


def test_two_requests_take_turns_and_their_memory_goes_with_them(llama):
    ids, _ = prompts(length=20, padding=0)
    with regard.attach(llama, [DUO], graphs=True) as handle, torch.no_grad():
        alone = [fed(llama, x, [12] + [1] * 6)[:, -1] for x in (ids, ids.flip(1))]
        caches = [DynamicCache(config=llama.config) for _ in range(2)]
        for at in range(12, 18):
            for i, cache in enumerate(caches):
                x = ids.flip(1) if i else ids
                first = 0 if at == 12 else at
                given = {"past_key_values": cache, "use_cache": True}
                if first == 0:
                    llama(input_ids=x[:, :12], **given)
                out = llama(input_ids=x[:, at : at + 1], position_ids=torch.full((1, 1), at), **given)
                if at == 17:
                    close(out.logits[:, -1], alone[i])
        steps = handle._steps
        assert steps._replay is not None
        del caches, cache, given, out
        gc.collect()
        assert steps._replay is None
        assert handle.nbytes == 0


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        (regard.place("s2", local=2, block=2, holes="leave"), "the kernels that decode know windows with sinks, not"),
        (regard.place("selective"), "follows each token in Python"),
        (regard.place("lol", amateur="exit"), "runs other branches"),
    ],
)
def test_what_has_no_fixed_steps_is_told_and_runs_as_ever(llama, placement, said):
    with regard.attach(llama, [placement]):
        wanted = generated(llama, "greedy", tokens=3)
    with regard.attach(llama, [placement], graphs=True) as handle:
        assert torch.equal(generated(llama, "greedy", tokens=3), wanted)
        assert "forwards of one token: as any other" in handle.explain()
        assert said in handle.explain()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"output_hidden_states": True}, "output_hidden_states was given"),
        ({"position_ids": None}, "no position_ids were given"),
        ({"grad": True}, "gradients are on"),
    ],
)
def test_a_forward_that_cannot_be_one_is_told(llama, given, said):
    ids, _ = prompts(length=12, padding=0)
    given = {"position_ids": torch.full((1, 1), 11), **given}
    with regard.attach(llama, [DUO], graphs=True) as handle:
        with torch.no_grad():
            cache = llama(input_ids=ids[:, :11], use_cache=True).past_key_values
        with torch.set_grad_enabled(given.pop("grad", False)):
            llama(input_ids=ids[:, 11:], past_key_values=cache, use_cache=True, **given)
        assert said in handle.explain()


def test_a_window_of_blocks_is_no_number_of_positions():
    """A block's first query sees fewer of them than its last."""
    assert codes.span(Pattern.window(2, 4)) is None
    q = torch.zeros(1, 2, 1, 16)
    assert "causal, window and sink" in decode.refuses(q, q, q, pattern=Pattern.window(2, 4))

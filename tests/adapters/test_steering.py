"""Mechanisms that steer by kinds of tokens, on vision-language models of every family."""

import pytest
import torch

import regard
import vlms
from contracts.subjects import example
from regard.adapters import tokens
from regard.adapters.families import open_decoder


@pytest.mark.parametrize("name", vlms.FAMILIES)
def test_three_methods_steer_every_family(name):
    """Prompts with one image and with two, padded: the row that answers changes, answers are made, nothing stays."""
    model, inputs = vlms.tiny(name)
    said = tokens.read(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits[:, -1]
    for stem in ("gift", "var", "dara"):
        with regard.attach(model, example(stem, open_decoder(model))) as handle, handle.reading(said):
            with handle.prompting(said.length), torch.no_grad():
                steered = model(**inputs).logits[:, -1]
            made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert steered.isfinite().all()
        assert ((steered - plain).abs().amax(1) > 1e-9).all(), f"{stem} changes nothing"
        assert made.shape[1] == said.length + 3
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[:, -1], plain)

"""Regions and threshold for a wanted share of skipped blocks."""

import pytest
import torch
import transformers as tf

import regard
from contracts.snapshot import snapshot
from families import VOCABULARY, tiny
from regard.calibrate import ffn_skip

FIRST, LAST = 2, 1


def text(n: int = 120) -> torch.Tensor:
    return torch.randint(2, VOCABULARY - 6, (n,), generator=torch.Generator().manual_seed(3))


def residual_stack():
    """A random Llama of ten layers whose middle blocks add a hundredth of what the others do."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=10, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
        for layer in model.model.layers[FIRST : 10 - LAST]:
            layer.mlp.down_proj.weight.mul_(0.01)
    return model


def loss(model, placements):
    with torch.no_grad(), regard.attach(model, placements) as handle, handle.prompting(16):
        logits = model(text()[None]).logits
    return torch.nn.functional.cross_entropy(logits[0, 16:-1], text()[17:]).item()


@pytest.mark.parametrize("share", [0.25, 0.4])
def test_the_suggestion_skips_the_wanted_share_of_idle_blocks_at_little_cost(share):
    model = residual_stack()
    before, told = snapshot(model), []
    options = ffn_skip.suggest(model, text(), share=share, warmup=4, progress=lambda *done: told.append(done))
    assert told[-1][0] == told[-1][1]
    assert snapshot(model) == before
    found = options.pop("share")
    assert found == pytest.approx(share, abs=0.05)
    assert ffn_skip.skipped(model, text(), options) == found
    assert loss(model, [regard.place("ffn_skip", **options)]) == pytest.approx(loss(model, []), rel=0.01)


def test_saturation_of_every_layer_is_measured_where_its_block_adds():
    for family in ("llama", "granite", "olmo2", "gpt_neox", "mixtral"):
        found = ffn_skip.saturations(tiny(family), text(40))
        assert found.shape == (3, 40)
        assert float(found.min()) < 0.999
    idle = ffn_skip.saturations(residual_stack(), text(40)).mean(1)
    assert float(idle[FIRST : 10 - LAST].min()) > 0.99 > float(idle[:FIRST].max())


def test_cold_regions_end_at_the_first_and_last_layer_above_the_threshold():
    mean = torch.tensor([0.5, 0.8, 0.95, 0.7, 0.96, 0.6])
    assert ffn_skip.cold(mean, 0.9) == (2, 1)
    assert ffn_skip.cold(mean, 0.1) == (0, 0)
    assert ffn_skip.cold(mean, 0.99) == (6, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.0}, "between 0 and 1"),
        ({"tokens": text(30)}, "more than 41 tokens of text, got 30"),
        ({"share": 0.99, "jump": 1}, "no threshold skips 99% of the blocks with jump 1; the nearest share is"),
    ],
)
def test_what_cannot_be_suggested_is_named(change, message):
    with pytest.raises(regard.RegardError, match=message):
        ffn_skip.suggest(residual_stack(), **{"tokens": text(), **change})

"""Papers' own decoders."""

import pytest
import torch

from regard.models import presets
from regard.models.hybrid import HybridForCausalLM


@pytest.fixture
def small():
    torch.manual_seed(0)
    return HybridForCausalLM(presets.tnl(vocab_size=40, hidden_size=64, layers=2, heads=4))


def test_tnl_decodes_as_it_reads(small):
    """fp32, to 1e-4; positions are learned in the first layer only."""
    assert small.model.layers[0].mixer.theta is not None
    assert small.model.layers[1].mixer.theta is None
    assert not [name for name, _ in small.named_parameters() if "norm" in name]
    ids, cache = torch.randint(0, 40, (2, 70)), small.eval().cache()
    with torch.no_grad():
        whole = small(ids).logits
        parts = [small(ids[:, :30], past_key_values=cache).logits]
        parts += [small(ids[:, t : t + 1], past_key_values=cache).logits for t in range(30, 70)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


def test_tnl_learns_bigrams(small):
    """A stream in which every token has one successor: the loss halves in forty steps."""
    generator = torch.Generator().manual_seed(1)
    after = torch.randperm(40, generator=generator)
    ids = [torch.randint(0, 40, (16,), generator=generator)]
    for _ in range(31):
        ids.append(after[ids[-1]])
    ids = torch.stack(ids, 1)
    optimizer, losses = torch.optim.AdamW(small.train().parameters(), lr=3e-3), []
    for _ in range(40):
        loss = small(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_frame_of_recall():
    """No feed-forward part; learned positions only where no other mixer keeps the order."""
    call = {"vocab_size": 64, "hidden_size": 32, "heads": 2, "length": 16}
    plain, mixed = (presets.recall(names, **call) for names in (["softmax"] * 2, ["kda", "softmax"]))
    assert (plain.positions, mixed.positions) == ("learned", "none")
    model = HybridForCausalLM(mixed).train()
    assert model.model.layers[0].mlp is None
    assert model.model.layers[1].mixer.heads == 1
    ids = torch.randint(0, 64, (2, 16))
    labels = torch.full_like(ids, -100)
    labels[:, 9] = ids[:, 1]
    logits = model(ids).logits
    assert logits.shape == (2, 16, 64)
    torch.manual_seed(3)
    loss = model(ids, shift_labels=labels).loss
    torch.manual_seed(3)
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, 9], labels[:, 9])
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match=r"no 'mixer'\. Did you mean 'mixers'"):
        presets.recall(["kda"], **call, mixer=["kda"])

"""The RAT mixer: decoding is the full forward, the cache is a chunk-th, a copy task is learnt, bad input is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regard.core.errors import RegardError
from regard.layers.states.rat import Mixer
from regard.primitives.elementwise import stepwise
from regard.primitives.memory import Memory

WIDTH, HEADS = 24, 6


def made(seed=0, **options):
    torch.manual_seed(seed)
    return Mixer(WIDTH, HEADS, **{"chunk": 4} | options).double()


@pytest.mark.parametrize("splits", [[1] * 18, [5, 1, 1, 1, 7, 3], [18]])
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_decoding_is_the_full_forward(splits, chunk):
    mixer, memory = made(chunk=chunk), Memory()
    x = torch.randn(3, 18, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        whole = mixer(x)
        parts = [mixer(part, memory=memory) for part in x.split(splits, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    assert memory.seen == 18
    assert memory.get("keys").shape[2] == -(-18 // chunk)


def test_beams_and_padding_follow_the_memory():
    mixer = made()
    x = torch.randn(2, 15, WIDTH, dtype=torch.float64)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :3] = False
    memory = Memory()
    with torch.no_grad():
        first = mixer(x[:, :10], memory=memory, mask=mask)
        memory.reorder(torch.tensor([1, 0, 0]))
        rest = torch.cat([mixer(x[[1, 0, 0], t : t + 1], memory=memory) for t in range(10, 15)], 1)
        alone = mixer(x[:1, 3:])
        other = mixer(x[1:])
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(first[0, 3:], alone[0, :7], **near)
    torch.testing.assert_close(rest[1:], alone[:, 7:].expand(2, -1, -1), **near)
    torch.testing.assert_close(rest[0], other[0, 10:], **near)


def test_packed_sequences_are_their_own():
    mixer = made()
    x = torch.randn(1, 14, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        packed = mixer(x, cu_seqlens=torch.tensor([0, 5, 14]))
        parts = torch.cat([mixer(x[:, :5]), mixer(x[:, 5:])], 1)
    torch.testing.assert_close(packed, parts, rtol=1e-12, atol=1e-12)


def test_one_chunk_is_a_gated_recurrence():
    mixer = made(chunk=50)
    x = torch.randn(2, 20, WIDTH, dtype=torch.float64)
    z, v, g, _, _ = mixer.inputs(x).split(mixer.sizes, -1)
    g = torch.sigmoid(g + mixer.bias)
    wanted = mixer.out(torch.sigmoid(z) * stepwise(g, (1 - g) * v)[0])
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-12, atol=1e-12)


def test_heads_read_their_group_in_turn():
    """Head h reads group h % G: exchanging two groups exchanges what neighbouring heads read."""
    mixer = made(groups=2)
    d = WIDTH // HEADS
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    order = torch.arange(WIDTH).view(3, 2, d).flip(1).flatten()
    other = made(groups=2)
    with torch.no_grad():
        rows = torch.cat([order, WIDTH + order, 2 * WIDTH + order])
        shared = 3 * WIDTH + torch.arange(4 * d).view(2, 2, d).flip(1).flatten()
        other.inputs.weight.copy_(mixer.inputs.weight[torch.cat([rows, shared])])
        other.bias.copy_(mixer.bias[order])
        other.out.weight.copy_(mixer.out.weight[:, order])
    torch.testing.assert_close(other(x), mixer(x), rtol=1e-12, atol=1e-12)


def test_the_gate_starts_by_spanning_chunks():
    mixer = Mixer(4096, 8, chunk=16)
    assert mixer.bias.min() >= 0
    assert mixer.bias.max() <= torch.tensor(15.0).log()
    assert abs(mixer.bias.exp().mean() - 8) < 0.3


class Block(nn.Module):
    def __init__(self, width, **options):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.mixer = Mixer(width, 4, **options)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.mixer(self.norms[0](x))
        return x + self.feed(self.norms[1](x))


@pytest.mark.slow
def test_two_layers_learn_to_copy_further_than_a_chunk():
    """The symbols come again after a lag of three chunks; a recurrence that ends with its chunk knows none."""
    lag, chunk, symbols, width = 12, 4, 8, 48
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(symbols, width), Block(width, chunk=chunk), Block(width, chunk=chunk), nn.Linear(width, symbols)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    right = 0.0
    for step in range(600):
        first = torch.randint(symbols, (48, lag))
        tokens = torch.cat([first, first], 1)
        logits = model(tokens[:, :-1])[:, lag - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), first.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 24:
            # The first symbol of the copy has nothing that says it comes next but its place.
            right = float((logits.argmax(-1) == first).double().mean())
            if right > 0.97:
                break
    assert right > 0.97


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chunk": 0}, "at least 1, got 0"),
        ({"groups": 4}, "6 heads and 4 groups"),
        ({"heads": 5}, "do not divide among 5 heads"),
        ({"heads": 8, "width": 24}, "even head size, got 3"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(RegardError, match=match):
        Mixer(**{"width": WIDTH, "heads": HEADS} | options)


def test_a_memory_of_another_chunk_is_refused():
    memory, x = Memory(), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    made(chunk=4)(x, memory=memory)
    with pytest.raises(RegardError, match=r"3 entries for 9 tokens.*one for 8"):
        made(chunk=8)(x[:, :1], memory=memory)
    other = Memory()
    other.set("state", torch.zeros(1, 2))
    other.advance(4)
    with pytest.raises(RegardError, match="not with a RAT mixer"):
        made()(x, memory=other)

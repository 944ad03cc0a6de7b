"""A causal model of two small layers that shows its probabilities and its states, and its training."""

import math

import torch
import torch.nn.functional as F
from torch import nn

HEADS, WIDTH = 2, 32


class Toy(nn.Module):
    """Layers of attention and a feed-forward part, normed before; `[B, T]` ids to logits, maps and states."""

    def __init__(self, vocabulary, length, layers=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.place = nn.Embedding(vocabulary, WIDTH), nn.Embedding(length, WIDTH)
        self.mix = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers)])
        self.up = nn.ModuleList([nn.Linear(WIDTH, 2 * WIDTH) for _ in range(layers)])
        self.down = nn.ModuleList([nn.Linear(2 * WIDTH, WIDTH) for _ in range(layers)])
        self.head = nn.Linear(WIDTH, vocabulary)

    def parts(self, layer, x):
        """q, k, v of a layer, `[B, HEADS, T, WIDTH / HEADS]` each."""
        return self.mix[layer](F.layer_norm(x, (WIDTH,))).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, ids):
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        maps, states = [], [x]
        for layer in range(len(self.mix)):
            q, k, v = self.parts(layer, x)
            maps.append((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -math.inf).softmax(-1))
            x = x + (maps[-1] @ v).transpose(1, 2).flatten(2)
            x = x + self.down[layer](F.relu(self.up[layer](F.layer_norm(x, (WIDTH,)))))
            states.append(x)
        return self.head(F.layer_norm(x, (WIDTH,))), maps, states


def next_token(logits, ids):
    """The mean loss of every next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model, rows, extra, steps, rate=1e-2):
    """Train on `rows(generator)` by next token and `extra(maps, states)`; the mean plain loss of the last 50 steps."""
    drawn, losses = torch.Generator().manual_seed(1), []
    optimiser = torch.optim.Adam(model.parameters(), rate, fused=True)
    for _ in range(steps):
        ids = rows(drawn)
        logits, maps, states = model(ids)
        plain = next_token(logits, ids)
        optimiser.zero_grad()
        (plain + extra(maps, states)).backward()
        optimiser.step()
        losses.append(float(plain.detach()))
    return sum(losses[-50:]) / 50

"""The loss in a loop, what it does not depend on, and a planted sink that training with it takes away."""

import pytest
import torch
import torch.nn.functional as F

import regard
from ops.objectives import toys
from regard.ops.objectives import avsr_decorrelation as decorrelation


def drawn(layers=4, B=2, T=7, d=5, seed=0):
    at = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, d, generator=at, dtype=torch.float64) for _ in range(layers)]


def test_the_loss_in_a_loop():
    states, mask = drawn(B=3), torch.ones(3, 7, dtype=torch.bool)
    mask[0, :2] = mask[1, 4:] = mask[2, 3] = False
    layers = []
    for state in states[1:-1]:
        samples = []
        for b, start in enumerate((2, 0, 0)):
            counted = [t for t in range(start + 1, 7) if mask[b, t]]
            cosines = [F.cosine_similarity(state[b, start], state[b, t], dim=0) ** 2 for t in counted]
            samples.append(torch.stack(cosines).mean())
        layers.append(torch.stack(samples).mean())
    torch.testing.assert_close(decorrelation.penalty(states, mask), 1e4 * torch.stack(layers).mean())


def test_gradients():
    given = [state.requires_grad_() for state in drawn(layers=3, T=4, d=3)]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda *states: decorrelation.penalty(states, mask, weight=3.0), given)


def test_alike_is_one_and_orthogonal_is_nothing():
    mask = torch.ones(1, 4)
    same = torch.randn(1, 1, 6, dtype=torch.float64).expand(1, 4, 6)
    assert float(decorrelation.penalty([same] * 3, mask, weight=1.0)) == pytest.approx(1)
    assert float(decorrelation.penalty([torch.eye(4)[None]] * 3, mask, weight=1.0)) == 0


def test_scale_sign_and_padding_do_not_matter():
    states, mask = drawn(), torch.ones(2, 7)
    plain = decorrelation.penalty(states, mask)
    factor = (torch.rand(2, 7, 1, dtype=torch.float64) + 0.5) * torch.tensor([1.0, -1.0])[:, None, None]
    scaled = [state * factor for state in states]
    torch.testing.assert_close(decorrelation.penalty(scaled, mask), plain)
    for left, right in ((0, 3), (4, 0)):
        wide = [F.pad(state, (0, 0, left, right), value=9.0) for state in states]
        torch.testing.assert_close(decorrelation.penalty(wide, F.pad(mask, (left, right))), plain)


def test_nothing_but_the_first_token():
    states = [state.requires_grad_() for state in drawn()]
    value = decorrelation.penalty(states, torch.eye(7)[:1].expand(2, -1))
    assert float(value.detach()) == 0
    assert all(slope.eq(0).all() for slope in torch.autograd.grad(value, states[1:-1]))
    empty = [torch.zeros(2, 7, 5, requires_grad=True) for _ in range(3)]
    value = decorrelation.penalty(empty, torch.ones(2, 7))
    assert torch.autograd.grad(value, empty[1])[0].isfinite().all()


def test_sinks_and_massive_activations():
    assert decorrelation.sinks(torch.tensor([0.6, 0.1, 0.31])).tolist() == [True, False, True]
    state = torch.full((2, 3, 4), 0.1)
    state[0, 1, 2] = -150.0
    state[1, 0, 0] = 99.0
    assert decorrelation.massive(state).nonzero().tolist() == [[0, 1, 2]]
    assert not decorrelation.massive(state * 10 + 1).any()


SINK, PLACE, PROMPT = 1, 3, 6  # token 0 is the first; token 1, at place 3 of a prompt of 6, is nearly the same


def rows(at, n=16):
    """A prompt with both sinks, then a token that says what stood at place 4, and random ones."""
    ids = torch.randint(2, 12, (n, 10), generator=at)
    ids[:, 0], ids[:, PLACE], ids[:, PROMPT] = 0, SINK, ids[:, PLACE + 1]
    return ids


def planted():
    """Every row looks at what is like the first token."""
    model = toys.Toy(12, 10)
    with torch.no_grad():
        model.embed.weight[0] *= 3
        model.embed.weight[SINK] = model.embed.weight[0]
        for layer in range(2):
            state = model(torch.zeros(1, 1, dtype=torch.long))[2][layer]
            key = model.parts(layer, state)[1][0, :, 0]
            bias = model.mix[layer].bias[: toys.WIDTH].view(toys.HEADS, -1)
            bias += 3 * bias.shape[1] ** 0.5 * key / key.square().sum(-1, keepdim=True)
    return model


def read(model):
    """The planted token's largest cos^2 with the first one, and the mean attention of later rows to it, last layer."""
    with torch.no_grad():
        _, maps, states = model(rows(torch.Generator().manual_seed(3)))
    first = torch.zeros(16, dtype=torch.long)
    alike = [decorrelation.aligned(state, first)[:, PLACE].max() for state in states[1:-1]]
    return float(max(alike)), float(maps[-1][..., PLACE + 1 :, PLACE].mean())


def test_a_planted_sink_goes_and_the_task_stays():
    prompt = (torch.arange(10) < PROMPT).expand(16, -1)
    plain, held = planted(), planted()
    start = read(plain)
    assert start[0] > 0.5
    assert start[1] > 0.3
    losses = []
    # Only what stands before a frozen model is trained, as a projector is, and its head. The first token stays.
    first = torch.ones(12, 1).index_fill_(0, torch.tensor(0), 0)
    for model, weight in ((plain, 0.0), (held, 10.0)):
        model.requires_grad_(False)
        model.head.requires_grad_()
        model.embed.weight.requires_grad_().register_hook(lambda slope: slope * first)
        extra = lambda _, states, w=weight: decorrelation.penalty(states, prompt, weight=w)  # noqa: E731
        losses.append(toys.train(model, rows, extra, 200, rate=3e-2))
    assert read(held)[0] < 0.1 < read(plain)[0]
    assert read(held)[1] < start[1] / 2
    assert losses[1] < 1.02 * losses[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"states": drawn(2)}, "at least 3, got 2"),
        ({"mask": torch.ones(2, 6)}, r"the mask \[B, T\], got \[\(2, 7, 5\)\] and \[2, 6\]"),
        ({"mask": torch.tensor([[1.0], [0.0]]).expand(2, 7)}, "samples 1 have no first token"),
        ({"weight": -1.0}, "at least 0, got -1.0"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(regard.RegardError, match=message):
        decorrelation.penalty(**{"states": drawn(), "mask": torch.ones(2, 7), **given})

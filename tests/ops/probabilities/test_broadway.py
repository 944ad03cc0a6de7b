"""Energies by sums, the closed form at 16 frames, and what guidance and gain do to random maps."""

import math

import pytest
import torch

import regard
from regard.ops.probabilities import broadway


def drawn(seed=0, batch=2, size=(3, 2), heads=2, frames=16, sharp=2.0):
    drawn = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, *size, heads, frames, frames, generator=drawn, dtype=torch.float64)
    return (scores * sharp).softmax(-1)


def by_sums(weights, reference, alpha, beta, tau, counted):
    """Row by row, the transform written out."""
    frames = weights.shape[-1]
    after = weights + alpha * (reference - weights)
    angle = 2 * math.pi / frames * torch.outer(torch.arange(frames), torch.arange(frames)).double()
    wave = torch.complex(angle.cos(), -angle.sin())
    bins = after.to(wave.dtype) @ wave
    high = [f for f in range(frames) if frames // 2 - tau <= f <= frames // 2 + tau]
    low = [f for f in range(frames) if f not in high]
    part = lambda among: (bins[counted][..., among].abs() ** 2 / frames).sum(-1).mean()  # noqa: E731
    first = (weights[counted] ** 2).sum(-1).mean()
    gain = max(beta, float(((first - part(low)) / part(high)).clamp(min=0).sqrt()))
    bins[..., high] *= gain
    made = (bins @ wave.conj() / frames).real
    return made / made.sum(-1, keepdim=True), gain


@pytest.mark.parametrize(
    ("alpha", "beta", "tau", "guided"), [(0.6, 1.5, 7, True), (0.1, 10.0, 7, False), (1, 0.0, 4, True)]
)
def test_definition(alpha, beta, tau, guided):
    weights, reference = drawn(), drawn(1, sharp=0.5)
    expected, _ = by_sums(weights, reference, alpha, beta, tau, slice(1, None) if guided else slice(None))
    found = broadway.rewrite(weights, reference, alpha=alpha, beta=beta, tau=tau, guided=guided)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_neutral_is_the_tensor_itself():
    weights = drawn()
    assert broadway.rewrite(weights, drawn(1), alpha=0.0, beta=1.0) is weights
    # The path that is left out would say the same.
    assert broadway.balance(
        broadway.energy(weights), *(broadway.energy(weights, 7, b) for b in ("low", "high")), 1.0
    ) == (pytest.approx(1.0))
    torch.testing.assert_close(broadway.amplified(weights, 1.0, 7), weights)


@pytest.mark.parametrize(("frames", "tau"), [(16, 7), (16, 3), (24, 7), (2, 0)])
def test_energies_add_up(frames, tau):
    weights = drawn(frames=frames)
    parts = broadway.energy(weights, tau, "low") + broadway.energy(weights, tau, "high")
    torch.testing.assert_close(parts, broadway.energy(weights))


@pytest.mark.parametrize("beta", [1.0, 1.5, 10.0])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tau", [7, 3])
def test_energy_does_not_fall(alpha, beta, tau):
    for seed in range(5):
        weights, reference = drawn(seed), drawn(seed + 50, sharp=0.3)
        found = broadway.rewrite(weights, reference, alpha=alpha, beta=beta, tau=tau)
        assert broadway.energy(found) >= broadway.energy(weights) - 1e-12
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1], dtype=found.dtype))


def test_sixteen_frames_have_a_closed_form():
    """With tau 7 the mean alone is low."""
    weights, reference = drawn(), drawn(1, sharp=0.2)
    after = weights + 0.6 * (reference - weights)
    _, gain = by_sums(weights, reference, 0.6, 1.5, 7, slice(None))
    found = broadway.rewrite(weights, reference)
    torch.testing.assert_close(found, 1 / 16 + gain * (after - 1 / 16), atol=1e-12, rtol=0)
    assert gain > 1.5
    assert found.min() < 0


def test_guidance_draws_closer():
    weights, reference = drawn(), drawn(1)
    found = broadway.rewrite(weights, reference, alpha=0.6, beta=0.0, tau=0)
    # Taken before the gain: at beta 0 the energy is restored in the one high frequency alone.
    after = torch.fft.fft(found)[..., :8]
    expected = torch.fft.fft(weights + 0.6 * (reference - weights))[..., :8]
    torch.testing.assert_close(after, expected)
    assert float((expected - torch.fft.fft(reference)[..., :8]).abs().sum()) == pytest.approx(
        0.4 * float((torch.fft.fft(weights - reference)[..., :8]).abs().sum())
    )


def test_the_reference_is_spread_over_pixels():
    reference = drawn(size=(2, 2))
    large = broadway.spread(reference, (6, 4))
    assert large.shape == (2, 6, 4, 2, 16, 16)
    torch.testing.assert_close(large.sum(-1), torch.ones_like(large[..., 0]))
    torch.testing.assert_close(large[:, 0, 0], reference[:, 0, 0])
    even = reference[:, :1, :1].expand(-1, 2, 2, -1, -1, -1)
    torch.testing.assert_close(broadway.spread(even, (6, 4)), even[:, :1, :1].expand(-1, 6, 4, -1, -1, -1))


def test_what_no_gain_restores():
    energies = [torch.tensor(x) for x in (0.1, 0.2, 0.05)]
    assert broadway.balance(*energies, 1.5) == 1.5
    assert broadway.balance(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.0), 2.0) == 2.0
    even = torch.full((2, 1, 1, 1, 16, 16), 1 / 16, dtype=torch.float64)
    torch.testing.assert_close(broadway.rewrite(even, even), even)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reference": None}, "needs the map of the first decoder block"),
        ({"weights": drawn(frames=15), "reference": drawn(frames=15)}, r"even and at least 2 tau \+ 2 = 16, got 15"),
        ({"weights": drawn(frames=14), "reference": drawn(frames=14)}, "at least 2 tau"),
        ({"reference": drawn(heads=3)}, "the reference of the same B, H and F"),
        ({"weights": drawn()[0]}, r"weights must be \[B, h, w, H, F, F\]"),
        ({"weights": drawn(batch=3), "reference": drawn(batch=3), "guided": True}, "two equal halves, got 3 rows"),
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"beta": -1.0}, "beta be at least 0"),
        ({"weights": drawn() * math.nan}, "NaN"),
    ],
)
def test_bad_input(changed, message):
    with pytest.raises(regard.RegardError, match=message):
        broadway.rewrite(**{"weights": drawn(), "reference": drawn(1), **changed})

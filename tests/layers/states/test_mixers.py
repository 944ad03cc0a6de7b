"""What every mixer promises: one forward, chunks and single tokens agree; rows, padding and packing do not matter."""

import itertools

import pytest
import torch

from regard.core.errors import RegardError
from regard.layers import mixers
from regard.primitives.memory import Memory

WIDTH, HEADS = 32, 2
NAMES = mixers.names()
OPTIONS = {name: {} for name in NAMES} | {
    "kda, safe": {"safe": True, "negative_eigenvalues": True},
    "gated_delta_net, grouped": {"value_heads": 4, "gate": False},
    "delta_net, gated": {"gate": True},
    "mla, deepseek": {
        "q_rank": 12, "rank": 10, "rope_size": 6, "head_size": 7, "value_size": 9, "interleaved": True, "bias": True,
    },
    "mla, plain": {"rope_size": 0, "latent_norm": False, "scale": 0.5},
    "softmax, window": {"window": 5, "kv_heads": 1, "rope": False},
    "tnl, low rank": {
        "gate": "low_rank", "norm": "layer", "value_silu": True, "positions": True, "schedule": "fla",
    },
}  # fmt: skip
VARIANTS = tuple(OPTIONS)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def made(variant, dtype=torch.float64):
    torch.manual_seed(3)
    name = variant.split(",")[0]
    mixer = mixers.build(name, WIDTH, HEADS, layer=0, layers=3, options=OPTIONS[variant]).to(dtype)
    for parameter in mixer.parameters():
        # Larger than a model starts with, so that gates differ from token to token.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return mixer.eval()


def some(rows, tokens, dtype=torch.float64):
    return torch.randn(rows, tokens, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(rows * tokens))


def cover(name, mask, seen):
    """Whoever reads tokens again has a mask of all of them; a recurrence is told of new tokens only."""
    return mask[:, seen:] if mixers.holds(name.split(",")[0]) == "state" else mask


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_equals_one_forward(name, dtype):
    mixer, x = made(name, dtype), some(2, 19, dtype)
    with torch.no_grad():
        whole, memory = mixer(x), Memory()
        parts = [mixer(x[:, a:b], memory=memory) for a, b in ((0, 7), (7, 8), (8, 9), (9, 13))]
        parts += [mixer(x[:, t : t + 1], memory=memory) for t in range(13, 19)]
    assert memory.seen == 19
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", VARIANTS)
def test_padding_is_not_there(name, side):
    """A padded row, prefilled and decoded, gives what the same row gives alone."""
    mixer, x = made(name), some(1, 14)
    before, after = {"left": (5, 0), "right": (0, 4), "both": (3, 2)}[side]
    pads = some(1, 5) * 3
    padded = torch.cat((pads[:, :before], x[:, :9], pads[:, :after], x[:, 9:]), 1)
    mask = torch.ones(1, padded.shape[1], dtype=torch.bool)
    mask[:, :before] = mask[:, before + 9 : before + 9 + after] = False
    prompt = before + 9 + after
    with torch.no_grad():
        alone, memory = mixer(x), Memory()
        out = [mixer(padded[:, :prompt], memory=memory, mask=mask[:, :prompt])]
        for t in range(prompt, padded.shape[1]):
            out.append(mixer(padded[:, t : t + 1], memory=memory, mask=cover(name, mask[:, : t + 1], t)))
    torch.testing.assert_close(torch.cat(out, 1)[mask][None], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_sequences_equal_separate_ones(name):
    mixer, x = made(name), some(1, 20)
    cuts = [0, 1, 4, 13, 20]
    with torch.no_grad():
        packed = mixer(x, cu_seqlens=torch.tensor(cuts))
        alone = [mixer(x[:, a:b]) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_independent_and_the_future_unseen(name):
    mixer, x = made(name), some(3, 11)
    changed = x.clone()
    changed[1] += 1
    changed[2, 6:] += 1
    with torch.no_grad():
        a, b = mixer(x), mixer(changed)
    torch.testing.assert_close(a[0], b[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(a[2, :6], b[2, :6], atol=1e-12, rtol=0)
    assert (a[1] - b[1]).abs().min() > 0
    assert (a[2, 6:] - b[2, 6:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name):
    mixer = made(name, torch.float32).train()
    (mixer(some(2, 12, torch.float32)) ** 2).sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", [n for n in NAMES if n != "softmax"])
def test_rows_of_a_memory_can_be_moved(name):
    """Beams: reordering what is remembered equals reordering the text."""
    mixer, x = made(name), some(2, 10)
    rows = torch.tensor([1, 1, 0])
    with torch.no_grad():
        memory = Memory()
        mixer(x[:, :6], memory=memory)
        memory.reorder(rows)
        after = torch.cat([mixer(x[rows, t : t + 1], memory=memory) for t in range(6, 10)], 1)
        torch.testing.assert_close(after, mixer(x)[rows][:, 6:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bad_calls(name):
    mixer = made(name)
    x = some(2, 6)
    with pytest.raises(RegardError, match=r"takes \[B, T, 32\], got \[2, 6, 31\]"):
        mixer(x[..., 1:])
    with pytest.raises(RegardError, match="mask must be bool"):
        mixer(x, mask=torch.ones(2, 6))
    with pytest.raises(RegardError, match="packed sequences"):
        mixer(x[:1], memory=Memory(), cu_seqlens=torch.tensor([0, 6]))
    if name != "hgrn":
        with pytest.raises(RegardError, match=r"layer 1 \(.*32 channels do not divide among 5 heads"):
            mixers.build(name, WIDTH, 5, layer=1, layers=3, options={"expand_k": 1.0} if name == "gla" else {})


@pytest.mark.parametrize("how", ["plain", "padded", "packed", "windowed"])
def test_softmax_that_drops_nothing(how):
    """Dropout of weights takes another path; dropping next to none of them is what it is without."""
    options = {"window": 4} if how == "windowed" else {}
    with_dropout, without = (
        mixers.build("softmax", WIDTH, HEADS, layer=0, layers=1, options={**options, "dropout": p}) for p in (1e-9, 0)
    )
    without.load_state_dict(with_dropout.state_dict())
    call = {}
    if how == "padded":
        call["mask"] = torch.arange(9) >= torch.tensor([[0], [3]])
    if how == "packed":
        call["cu_seqlens"] = torch.tensor([0, 2, 9])
    x = some(1 if how == "packed" else 2, 9, torch.float32)
    ours, expected = with_dropout.train()(x, **call), without.train()(x, **call)
    assert ours.isfinite().all()
    real = call.get("mask", torch.ones(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(ours[real], expected[real])


def test_softmax_drops_while_training():
    mixer = mixers.build("softmax", WIDTH, HEADS, layer=0, layers=1, options={"dropout": 0.5})
    x = some(2, 9, torch.float32)
    assert not torch.equal(mixer.train()(x), mixer(x))
    assert torch.equal(mixer.eval()(x), mixer(x))


def test_names():
    with pytest.raises(RegardError, match=r"unknown mixer 'gated_deltanet'.*Did you mean 'gated_delta_net'"):
        mixers.load("gated_deltanet")
    with pytest.raises(RegardError, match=r"unknown option of mixer kda 'kernels'.*Did you mean 'kernel'"):
        mixers.build("kda", 32, 2, layer=0, layers=1, options={"kernels": 3})

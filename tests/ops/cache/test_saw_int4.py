"""SAW-INT4: the sheet's seven oracles and its numbers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.core.step import Step
from regard.ops.attention import attend
from regard.ops.cache.saw_int4 import dequantise, encode, hadamard, pack, quantise, unpack
from regard.primitives.buffer import live_bytes
from regard.primitives.full import Full
from regard.primitives.ring import Ring

OPTIONS = {"key_bits": 4, "value_bits": 4, "block": None, "rotate_v": False}


def where(D=64):
    return Where(layer=0, layers=1, heads=6, kv_heads=3, head_dim=D)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sylvester(order):
    return torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(order)] for i in range(order)]) / order**0.5


@pytest.mark.parametrize("order", [1, 2, 16, 64])
def test_rotation_is_the_block_diagonal_sylvester_matrix_and_its_own_inverse(order):
    x = random(2, 3, 5, 64, dtype=torch.float64)
    matrix = torch.block_diag(*[sylvester(order).double()] * (64 // order))
    torch.testing.assert_close(hadamard(x, order), x @ matrix, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(hadamard(hadamard(x, order), order), x, atol=1e-12, rtol=1e-12)


def test_rotation_alone_leaves_logits_and_outputs_unchanged():
    """Oracle 1."""
    q, k, v = (random(1, h, 9, 64, seed=h, dtype=torch.float64) for h in (6, 3, 2))
    v = v[:, :1].expand(-1, 3, -1, -1)
    want, lse = attend(q, k, v)
    out, rotated_lse = attend(hadamard(q, 64), hadamard(k, 64), hadamard(v, 64))
    torch.testing.assert_close(rotated_lse, lse, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(hadamard(out, 64), want, atol=1e-12, rtol=1e-12)


def test_order_1_is_plain_int4():
    """Oracle 2."""
    key, value = encode(where(), **OPTIONS | {"block": 1})
    x = random(1, 3, 5, 64)
    for codec in (key, value):
        assert all(torch.equal(a, b) for a, b in zip(codec.encode(x), quantise(x, 4), strict=True))
        assert codec.query(x) is x
    assert key.name == value.name == "int4"


vectors = st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8)


@settings(deadline=None)
@given(vectors, st.sampled_from([4, 8]))
def test_error_is_at_most_half_a_step(vector, bits):
    """Oracle 3."""
    z = torch.tensor(vector)
    fields = quantise(z, bits)
    back = dequantise(fields, torch.float32, bits)
    step, rounding = fields[1][0], 1e-6 * z.abs().max()
    assert ((z - back).abs() <= step / 2 + rounding).all()
    assert (back.min() - z.min()).abs() <= rounding + 1e-8
    assert (back.max() - z.max()).abs() <= rounding + 1e-8


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7e5, 1e-12])
def test_constant_vectors_come_back(value):
    z = torch.full((2, 8), value)
    assert torch.equal(dequantise(quantise(z, 4), torch.float32, 4), z)


def test_quantisation_is_the_paper_s_in_a_loop():
    z = random(50, 8)
    for row, back in zip(z, dequantise(quantise(z, 4), torch.float32, 4), strict=True):
        lo, hi = row.min().double(), row.max().double()
        s = (hi - lo).clamp(min=1e-8) / 15
        zp = -lo / s
        for number, got in zip(row.double(), back, strict=True):
            code = torch.floor(number / s + zp + 0.5).clamp(0, 15)
            assert got.item() == pytest.approx(((code - zp) * s).item(), abs=1e-5)


def test_codes_pack_low_half_low():
    """Oracle 4."""
    codes = torch.randint(0, 16, (3, 7, 64), dtype=torch.uint8)
    packed = pack(codes)
    assert torch.equal(unpack(packed), codes)
    for i in range(32):
        assert torch.equal(packed[..., i], codes[..., i] + 16 * codes[..., i + 32])


def test_slots_in_any_order_read_the_same():
    """Oracle 5: nothing depends on where a token lies, so pages may."""
    x = random(1, 3, 40, 64)
    page = torch.randperm(40)
    fields = tuple(f[:, :, page] for f in quantise(x, 4))
    assert torch.equal(dequantise(fields, torch.float32, 4), dequantise(quantise(x, 4), torch.float32, 4)[:, :, page])


@pytest.mark.parametrize(("bits", "size"), [(4, 64 // 2 + 8), (8, 64 + 8)])
@torch.no_grad()
def test_bytes_of_a_token_and_head(bits, size):
    """Oracle 6, in codes and in the store."""
    fields = quantise(random(1, 1, 1, 64), bits)
    assert sum(f.numel() * f.element_size() for f in fields) == size
    store = Full(attend, *encode(where(), **OPTIONS | {"key_bits": bits, "value_bits": bits}))
    store.append(*(random(2, 3, 100, 64, seed=s) for s in (0, 1)), Step(0, 100, 2, torch.device("cpu")))
    assert live_bytes(store.storages()) == 2 * store.capacity["full"] * 2 * size


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 59), max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([32, 64, 128]),
)
def test_incremental_writes_equal_one(cuts, dtype, D):
    """Oracle 7, to the bit; sums in fp32 fail it at D = 32 and 128."""
    x = (random(2, 3, 600, D) * torch.logspace(-3, 3, D)).to(dtype)
    key, _ = encode(where(D), **OPTIONS)
    cuts = [0, *sorted(set(cuts)), 600]
    parts = zip(*(key.encode(x[:, :, a:b]) for a, b in pairwise(cuts)), strict=True)
    for part, whole in zip(parts, key.encode(x), strict=True):
        assert torch.equal(torch.cat(part, 2), whole)


@pytest.mark.parametrize("rotate_v", [False, True])
@pytest.mark.parametrize("ring", [False, True])
@torch.no_grad()
def test_cached_decoding_replays_the_codes_of_one_forward(rotate_v, ring):
    q, k, v = (random(1, h, 50, 64, seed=h) for h in (6, 3, 3))
    key, value = encode(where(), **OPTIONS | {"rotate_v": rotate_v})
    pattern = Pattern.sink(2) | Pattern.window(9) if ring else Pattern.causal()
    store = Ring(attend, 2, 9, key, value) if ring else Full(attend, key, value)
    outs = []
    for start, stop in pairwise([0, 30, *range(31, 51)]):
        step = Step(start, stop - start, 1, torch.device("cpu"))
        view = store.append(k[:, :, start:stop], v[:, :, start:stop], step)
        outs.append(view.attend(q[:, :, start:stop], pattern=pattern, step=step, scale=0.125)[0])
    k, v = (c.decode(c.encode(x), torch.float64) for c, x in ((key, k), (value, v)))
    want, _ = attend(hadamard(q.double(), 64), k, v, pattern=pattern, scale=0.125)
    want = hadamard(want, 64) if rotate_v else want
    torch.testing.assert_close(torch.cat(outs, 2).double(), want, atol=2e-5, rtol=2e-5)


def _logit_rmse(k, order):
    q = random(256, k.shape[-1], seed=7, dtype=torch.float64)
    z = dequantise(quantise(hadamard(k, order), 4), torch.float64, 4)
    return (hadamard(q, order) @ z.mT - q @ k.mT).square().mean().sqrt().item()


def test_rotation_removes_the_damage_of_outlier_channels():
    k = random(2000, 128, dtype=torch.float64)
    k[:, 5] *= 30
    k[:, 70] += 40
    plain, small, *large = (_logit_rmse(k, order) for order in (1, 16, 64, 128))
    assert plain == pytest.approx(12.7, rel=0.06)
    assert small == pytest.approx(5.3, rel=0.06)
    assert small < plain / 2
    assert max(large) <= 3.55


def test_on_gaussian_keys_all_orders_are_equal():
    k = random(4000, 128, dtype=torch.float64)
    errors = [_logit_rmse(k, order) for order in (1, 16, 64, 128)]
    assert max(errors) < 1.02 * min(errors)


def test_16_bits_leave_everything_alone():
    assert encode(where(), **OPTIONS | {"key_bits": 16, "value_bits": 16}) == (None, None)
    assert encode(where(), **OPTIONS | {"key_bits": 16, "value_bits": 16, "rotate_v": True}) == (None, None)
    key, value = encode(where(), **OPTIONS | {"value_bits": 8, "key_bits": 16})
    assert key is None
    assert value.name == "int8"


@pytest.mark.parametrize(
    ("D", "name"), [(64, "int4 hadamard 64"), (256, "int4 hadamard 128"), (96, "int4 hadamard 32")]
)
def test_default_order(D, name):
    assert encode(where(D), **OPTIONS)[0].name == name


@pytest.mark.parametrize("block", [0, 3, 128])
def test_bad_block_is_named(block):
    with pytest.raises(RegardError, match=rf"divides the head dimension 64, got {block}; the largest is 64"):
        encode(where(), **OPTIONS | {"block": block})


def test_odd_dimension_is_refused():
    with pytest.raises(RegardError, match="even head dimension, got 65"):
        encode(where(65), **OPTIONS)


def test_block_without_rotation_warns():
    with pytest.warns(UserWarning, match="block=16 is ignored"):
        encode(where(), **OPTIONS | {"key_bits": 16, "block": 16})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad):
    x = random(1, 3, 5, 64)
    x[0, 1, 2, 3] = bad
    for codec in encode(where(), **OPTIONS):
        with pytest.raises(RegardError, match="not finite"):
            codec.encode(x)


def test_gradients_pass_straight_through():
    q, k, v = (random(1, h, 12, 64, seed=h, dtype=torch.float64).requires_grad_() for h in (6, 3, 3))
    key, value = encode(where(), **OPTIONS | {"key_bits": 8, "value_bits": 8, "rotate_v": True})
    step = Step(0, 12, 1, torch.device("cpu"))
    out, _ = Full(attend, key, value).append(k, v, step).attend(q, pattern=Pattern.causal(), step=step, scale=0.125)
    out.square().sum().backward()
    got = [x.grad for x in (q, k, v)]
    again = [x.detach().requires_grad_() for x in (q, k, v)]
    attend(*again, scale=0.125)[0].square().sum().backward()
    # 8-bit numbers are close to exact ones, and so must their gradients be.
    for a, b in zip(got, again, strict=True):
        assert (a - b.grad).norm() < 0.03 * b.grad.norm()

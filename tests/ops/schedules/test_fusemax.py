"""Softmax in three, two and one passes [007]: the oracles of its sheet, and the counts against what the ops do."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard.ops.cascades import Cascade, Einsum
from regard.ops.schedules import fusemax


def inputs(B=1, H=1, Hk=1, T=6, S=24, D=4, Dv=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=dtype) for s in ((B, H, T, D), (B, Hk, S, D), (B, Hk, S, Dv))]


def sizes(P=6, M=24, E=4, F=5, M0=8):
    return {"p": P, "m": M, "m1": M // M0, "m0": M0, "e": E, "f": F}


class Meter(TorchDispatchMode):
    """Counts, of every op that runs: elements read of each input, made by name, multiply-adds, the largest."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = [x.untyped_storage().data_ptr() for x in inputs]
        self.read, self.made, self.products, self.most = [0] * len(inputs), {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [x for x in args if isinstance(x, torch.Tensor)]
        if isinstance(out, torch.Tensor) and all(
            x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() for x in given
        ):
            for x in given:
                if (at := x.untyped_storage().data_ptr()) in self.inputs:
                    self.read[self.inputs.index(at)] += x.numel()
            self.made[name] = self.made.get(name, 0) + out.numel()
            self.most = max(self.most, out.numel())
            if name in ("bmm", "mm"):
                self.products += out.numel() * given[0].shape[-1]
        return out


def measured(passes, **shape):
    q, k, v = inputs(**shape)
    with Meter(q, k, v) as meter:
        fusemax.attend(q, k, v, passes=passes, chunk=8)
    return meter


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 8, 24])
def test_all_equal_torch(passes, chunk):
    q, k, v = inputs(B=2, H=4, Hk=2)
    out, lse = fusemax.attend(q, k, v, passes=passes, chunk=chunk)
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, wanted, atol=1e-14, rtol=0)
    torch.testing.assert_close(lse, regard.attend(q, k, v, causal=False)[1], atol=1e-13, rtol=0)
    short = fusemax.attend(q, k, v, passes=passes, chunk=7, pad=True)[0]
    torch.testing.assert_close(short, wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_large_logits_are_stable(passes):
    q, k, v = inputs(dtype=torch.float32)
    k = torch.linspace(-1e4, 1e4, 24)[None, None, :, None].expand(1, 1, 24, 4)
    out, lse = fusemax.attend(torch.ones_like(q), k, v, passes=passes, chunk=8, scale=0.25)
    torch.testing.assert_close(out, v[:, :, -1:].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 1e4))


def test_passes_are_three_two_and_one():
    for passes, cascade in fusemax.CASCADES.items():
        assert cascade.passes("m") == passes
        assert cascade.passes("p") == 1


def test_a_division_before_the_product_with_values_is_one_more_pass():
    three = fusemax.CASCADES[3]
    late = (
        *three.einsums[:4],
        Einsum("SNV", ("f", "p"), ("SN", "V"), "multiply"),
        Einsum("AV", ("f", "p"), ("SNV", "SD"), "divide"),
    )
    assert Cascade(three.inputs, late, {}).passes("m") == 2
    assert three.passes("m") == 3
    one = sizes()
    assert Cascade(three.inputs, late, {}).operations(one)["divide"] == one["f"] * one["p"]


def test_live_elements_grow_with_the_keys_in_all_but_one_pass():
    one, two, three = ([fusemax.CASCADES[n].live_elements(sizes(M=M), "m") for M in (24, 48, 96)] for n in (1, 2, 3))
    assert one == [6 * (4 + 5 + 2)] * 3
    assert two == [6 * ((5 + 2) * M // 8 + max(4 + 1, 5 + 2)) for M in (24, 48, 96)]
    assert three == [6 * (M + max(4 + 1, 5 + 1)) for M in (24, 48, 96)]


def test_moved_elements_equal_the_closed_forms():
    P, M, E, W, M1 = 6, 24, 4, 5, 3
    plain = E * P + E * M + W * M + W * P
    spilled = {1: 0, 2: 2 * (W + 2) * M1 * P, 3: 4 * M * P}
    for passes, cascade in fusemax.CASCADES.items():
        assert sum(cascade.traffic(sizes(), "m").values()) == plain
        assert sum(cascade.traffic(sizes(), "m", spill=True).values()) == plain + spilled[passes]


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("shape", [{}, {"T": 3, "S": 40, "D": 2, "Dv": 7}, {"S": 8}])
def test_the_executed_op_reads_and_computes_what_the_cascade_says(passes, shape):
    meter = measured(passes, **shape)
    full = {"T": 6, "S": 24, "D": 4, "Dv": 5} | shape
    size = sizes(full["T"], full["S"], full["D"], full["Dv"])
    cascade = fusemax.CASCADES[passes]
    counts = cascade.operations(size)
    moved = cascade.traffic(size, "m")
    assert meter.read == [moved["Q"], moved["K"], moved["V"]]
    assert meter.made["exp"] == counts["exp"]
    assert meter.made["div"] == counts["divide"]
    # Multiply-adds with no matrix product: rescaling and adding what chunks have left.
    alone = {3: 0, 2: size["m1"] * size["p"] * (1 + size["f"]), 1: size["m1"] * size["p"] * (1 + size["f"])}
    assert meter.products == counts["multiply"] - alone[passes]


def test_the_largest_tensor_that_the_executed_op_makes_grows_as_the_live_elements_do():
    most = {passes: [measured(passes, T=1, S=S).most for S in (80, 160)] for passes in (1, 2, 3)}
    assert most[1] == [8, 8]
    assert most[2] == [5 * 80 // 8, 5 * 160 // 8]
    assert most[3] == [80, 160]


def test_one_chunk_of_all_keys_is_one_step_and_divisions_are_deferred():
    size = sizes(M0=24)
    assert fusemax.CASCADES[1].operations(size)["exp"] == 6 * (24 + 1)
    divisions = {n: c.operations(sizes())["divide"] for n, c in fusemax.CASCADES.items()}
    assert divisions == {3: 24 * 6, 2: 5 * 6, 1: 5 * 6}


def test_the_papers_array_is_bound_by_its_square_part():
    size = sizes(P=1024, M=65536, E=64, F=64, M0=256)
    square, row = fusemax.CASCADES[1].cycles(size)
    # Per pair: 64 + 64 multiply-adds, a maximum, an exponential of seven operations, an addition.
    assert square == pytest.approx(1024 * 65536 * (64 + 64 + 1 + 7 + 1) / 256**2)
    assert row < square
    seconds, bound = fusemax.CASCADES[1].seconds(size, "m", rate=1e15, bandwidth=4e12)
    assert bound == "compute"
    assert seconds == pytest.approx(sum(fusemax.CASCADES[1].operations(size).values()) / 1e15, rel=0.1)


@pytest.mark.parametrize(
    ("words", "more"),
    [("24 keys are not divisible by chunk 7; pass pad=True", {"chunk": 7}),
     ("cascades of 1, 2 and 3 passes, got 4", {"passes": 4}),
     ("chunks of at least 1, got 24 keys, chunk 0", {"chunk": 0})],
)  # fmt: skip
def test_what_does_not_fit_is_named(words, more):
    with pytest.raises(regard.RegardError, match=words):
        fusemax.attend(*inputs(), **more)
    assert math.isfinite(float(fusemax.attend(*inputs(), chunk=12)[0].sum()))

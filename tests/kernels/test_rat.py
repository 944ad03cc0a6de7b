"""The RAT kernels against the definition in float64: interpreted, or compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from regard.kernels.states import rat as kernel
from regard.layers.blocks.heads import join, split
from regard.ops.states.rat import scan
from running import DEVICE, drawn, filled_with_nan

# A GPU multiplies in 16 bits only; the interpreter is tested in float32.
EXACT = torch.float32 if DEVICE == "cpu" else torch.bfloat16
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def definition(joined, bias, *, heads, groups, chunk, base):
    width = bias.shape[0]
    z, v, g, q, k = joined.split([width] * 3 + [groups * width // heads] * 2, -1)
    shapes = ((q, groups), (k, groups), (v, heads), (torch.sigmoid(g + bias), heads))
    out, _ = scan(*(split(x, n) for x, n in shapes), chunk=chunk, base=base, check=False, backend="reference")
    return torch.sigmoid(z) * join(out)


def check(T, *, B=1, heads=2, groups=1, D=8, chunk=4, base=10000.0, dtype=EXACT):
    """The output and both gradients, by the norm of what they err."""
    make = drawn(0)
    call = {"heads": heads, "groups": groups, "chunk": chunk, "base": base}
    given = [make(B, T, (3 * heads + 2 * groups) * D).to(dtype), make(heads * D).to(dtype)]
    weight = make(B, T, heads * D).to(dtype)

    def run(mix, tensors):
        for x in tensors:
            x.requires_grad_()
        y = mix(*tensors, **call)
        y.backward(weight.to(y))
        return y.detach(), *(x.grad for x in tensors)

    wanted = run(definition, [x.double() for x in given])
    with filled_with_nan():
        found = run(kernel.mix, [x.to(DEVICE) for x in given])
    assert [x.dtype for x in found] == [dtype] * 3
    for name, x, known in zip(("y", "dx", "dbias"), found, wanted, strict=True):
        error = (x.cpu().double() - known).norm() / known.norm()
        assert error <= ERRORS[dtype], f"{name} errs by {error:.1e}"


@pytest.mark.parametrize(("T", "chunk"), [(1, 4), (4, 4), (5, 4), (9, 4), (3, 1)])
def test_lengths(T, chunk):
    check(T, chunk=chunk)


@pytest.mark.parametrize(("B", "heads", "groups"), [(2, 1, 1), (1, 4, 2), (1, 3, 1)])
def test_rows_heads_and_groups(B, heads, groups):
    check(5, B=B, heads=heads, groups=groups, chunk=3)


@pytest.mark.parametrize("base", [None, 50.0])
def test_sizes_and_positions(base):
    check(5, D=24, base=base, chunk=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(10, dtype=dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="what the interpreter would take too long for")
@pytest.mark.parametrize("chunk", [16, 64])
def test_long_rows(chunk):
    check(3001, B=2, heads=8, groups=2, D=128, chunk=chunk)


def test_what_is_refused():
    joined = torch.randn(1, 3, 8 * 8)
    assert "CUDA" in kernel.refuses(joined, heads=2, groups=1)

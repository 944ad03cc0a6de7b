"""The vector recurrence against its definition, a loop over tokens."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.primitives.elementwise import recur, stepwise


def made(T, D=3, lead=(2,), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    forget = torch.rand(*lead, T, D, generator=g, dtype=torch.float64).to(dtype)
    inputs = torch.randn(*lead, T, D, generator=g, dtype=torch.float64).to(dtype)
    initial = torch.randn(*lead, D, generator=g, dtype=torch.float64).to(dtype)
    return forget, inputs, initial


@pytest.mark.parametrize("T", [0, 1, 2, 7, 8, 9, 63, 64, 65, 200, 4097])
@pytest.mark.parametrize("started", [False, True])
def test_equals_the_loop(T, started):
    forget, inputs, initial = made(T)
    for found, wanted in zip(
        recur(forget, inputs, initial=initial if started else None),
        stepwise(forget, inputs, initial=initial if started else None),
        strict=True,
    ):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 5, 16, 17, 100])
@pytest.mark.parametrize("reset", [1, 4, 16, 200])
def test_a_reset_makes_every_chunk_a_sequence_of_its_own(T, reset):
    forget, inputs, _ = made(T, lead=(2, 3))
    h, last = recur(forget, inputs, reset=reset)
    pieces = zip(forget.split(reset, -2), inputs.split(reset, -2), strict=True)
    wanted = [stepwise(f, x) for f, x in pieces]
    torch.testing.assert_close(h, torch.cat([w[0] for w in wanted], -2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, wanted[-1][1], rtol=1e-12, atol=1e-12)
    looped = stepwise(forget, inputs, reset=reset)
    torch.testing.assert_close(h, looped[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("T", "reset"), [(1, None), (19, None), (70, None), (11, 4), (8, 4)])
def test_gradients(T, reset):
    """Against finite differences, the second derivatives too."""
    forget, inputs, initial = (x.requires_grad_() for x in made(T, D=2, lead=(1,)))
    call = (forget, inputs) if reset else (forget, inputs, initial)

    def run(f, x, start=None):
        return recur(f, x, initial=start, reset=reset)

    assert torch.autograd.gradcheck(run, call)
    if T < 20:
        assert torch.autograd.gradgradcheck(run, call)


@pytest.mark.parametrize("T", [300, 4097])
def test_gradients_equal_those_of_the_loop(T):
    grads = []
    for run in (recur, stepwise):
        leaves = [x.requires_grad_() for x in made(T)]
        h, last = run(leaves[0], leaves[1], initial=leaves[2])
        (h.square().sum() + last.sin().sum()).backward()
        grads.append([x.grad for x in leaves])
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_extreme_gates_stay_finite():
    forget, inputs, _ = made(1000)
    forget[:, 100:600] = 0
    forget[:, 600:] = 1
    forget.requires_grad_()
    h, _ = recur(forget, inputs)
    torch.testing.assert_close(h[:, 100:600], inputs[:, 100:600])
    torch.testing.assert_close(h[:, 600:], inputs[:, 600:].cumsum(1) + inputs[:, 599:600])
    h.sum().backward()
    assert forget.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    forget, inputs, initial = made(513, dtype=dtype)
    h, last = recur(forget, inputs, initial=initial)
    wanted, end = stepwise(forget.double(), inputs.double(), initial=initial.double())
    assert h.dtype == dtype
    assert last.dtype == torch.float32
    torch.testing.assert_close(last.double(), end, rtol=1e-5, atol=1e-5)
    # One rounding, not one a step.
    assert (h.double() - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()


def test_strides_do_not_matter():
    forget, inputs, _ = made(50, D=4, lead=(2, 3))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (forget, inputs)]
    assert torch.equal(recur(*turned)[0], recur(forget, inputs)[0])


def test_states_equal_flash_linear_attention():
    hgrn = pytest.importorskip("fla.ops.hgrn.naive")
    forget, inputs, _ = made(67, dtype=torch.float32)
    wanted, _ = hgrn.naive_recurrent_hgrn(inputs, forget.log())
    torch.testing.assert_close(recur(forget, inputs)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"forget": torch.rand(2, 5, 4)}, r"\[2, 5, 4\] and \[2, 5, 3\]"),
        ({"forget": torch.rand(2, 5, 3).double()}, "float64"),
        ({"initial": torch.rand(3)}, r"\[2, 3\], got \[3\]"),
        ({"reset": 0}, "at least 1, got 0"),
        ({"reset": 2, "initial": torch.rand(2, 3)}, "reset=2"),
    ],
)
def test_errors(change, match):
    call = {"forget": torch.rand(2, 5, 3), "inputs": torch.rand(2, 5, 3)} | change
    for run in (recur, stepwise):
        with pytest.raises(RegardError, match=match):
            run(**call)

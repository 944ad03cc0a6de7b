"""How kernels are run in tests: on a GPU where there is one, else by Triton's interpreter (see tests/conftest.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What a result may err by, of its largest entry: sums in float32, and rounding to its dtype. The interpreter cuts a
# bfloat16 off where a GPU rounds it.
FLOATS = {torch.float32: 1e-5, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7, torch.float16: 2**-10}


def drawn(seed: int) -> Callable[..., Tensor]:
    """A function from a shape to float64 numbers, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, most: float) -> None:
    """Assert that `found` errs by no more than `most` of the largest entry of `expected`."""
    assert found.shape == expected.shape
    assert found.isfinite().all(), f"{(~found.isfinite()).sum()} entries are not finite"
    error = (found.double().cpu() - expected.double().cpu()).abs().max() / expected.double().abs().max().clamp(min=1.0)
    assert error <= most, f"errs by {error:.2e}, more than {most:.2e}"


def right(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Assert that an output and its log-sum-exps are those in float64; rows that see nothing have 0 and -inf."""
    (out, lse), (wanted, masses) = found, expected
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    empty = masses == -torch.inf
    assert torch.equal(lse.cpu() == -torch.inf, empty)
    assert (out.cpu()[empty] == 0).all()
    close(out, wanted, FLOATS[dtype])
    close(lse.cpu().masked_fill(empty, 0), masses.masked_fill(empty, 0), 1e-5)


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """Inside, memory that torch does not set holds NaN, so that a kernel that leaves an entry out is seen."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            with torch.no_grad():  # the inputs of a rehearsal may want gradients
                return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

        return made

    names = ("empty", "empty_like", "empty_strided")
    with patch.multiple(torch, **{name: filling(getattr(torch, name)) for name in names}):
        methods = {name: filling(getattr(Tensor, name)) for name in ("new_empty", "new_empty_strided")}
        with patch.multiple(Tensor, **methods):
            yield

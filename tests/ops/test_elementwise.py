"""Which path the vector recurrence takes. What it computes is tested in tests/primitives and tests/kernels."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.ops.elementwise import recur
from regard.primitives.elementwise import stepwise


@pytest.mark.parametrize("backend", ["auto", "stepwise", "chunked"])
@pytest.mark.parametrize("reset", [None, 4])
def test_on_a_cpu_it_is_plain_torch(backend, reset):
    forget, inputs = torch.rand(2, 9, 3, dtype=torch.float64), torch.randn(2, 9, 3, dtype=torch.float64)
    for found, wanted in zip(
        recur(forget, inputs, reset=reset, backend=backend), stepwise(forget, inputs, reset=reset), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reset", [None, 4])
def test_on_a_gpu_it_is_the_kernel(reset):
    forget, inputs = torch.rand(2, 9, 32, device="cuda"), torch.randn(2, 9, 32, device="cuda")
    assert torch.equal(recur(forget, inputs, reset=reset)[0], recur(forget, inputs, reset=reset, backend="triton")[0])


@pytest.mark.parametrize(
    ("backend", "match"), [("triton", "refuses: kernels run on a CUDA device"), ("tritom", "'triton'")]
)
def test_a_named_backend_never_falls_back(backend, match):
    with pytest.raises(RegardError, match=match):
        recur(torch.rand(2, 9, 3), torch.rand(2, 9, 3), backend=backend)

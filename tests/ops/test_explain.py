import pytest
import torch

import regard
from regard import Pattern
from regard.core.errors import RegardError


def made(T=8, S=20, H=4, Hk=2, D=16):
    return torch.zeros(1, H, T, D), torch.zeros(1, Hk, S, D), torch.zeros(1, Hk, S, D)


def test_it_says_what_runs_and_why_not_the_others():
    told = regard.explain(*made(), pattern=Pattern.window(5))
    assert told.backend == "sdpa"
    assert [verdict.backend for verdict in told.verdicts] == ["decode", "block", "sdpa", "reference"]
    words = str(told).splitlines()
    assert words[0] == "sdpa: torch's fused kernels do this exactly"
    assert "% of the pairs" in words[1]
    assert "not block: refuses: kernels run on a CUDA device, not on cpu" in str(told)
    assert "not reference: can do it, asked later" in str(told)


def test_density_is_that_of_the_pattern():
    told = regard.explain(*made(T=20), pattern=Pattern.window(5))
    assert told.density == Pattern.window(5).density(20)
    assert regard.explain(*made()).density is None


def test_what_refuses_is_named():
    told = regard.explain(*made(), softcap=3.0)
    assert told.backend == "reference"
    assert "not sdpa: refuses: torch's fused kernels have no softcap" in str(told)


def test_a_named_backend_does_not_fall_back():
    with pytest.raises(RegardError, match="backend 'block' refuses: kernels run on a CUDA device"):
        regard.explain(*made(), backend="block")
    assert regard.explain(*made(), backend="reference").why == "asked for"

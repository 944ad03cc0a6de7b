"""Every kernel compiles for a Hopper GPU, and keeps what it works on in registers."""

import pytest

import compiled

pytest.importorskip("triton")

MOST_SPILLED = 32  # bytes a thread: a few words outside the inner loop cost nothing


@pytest.mark.parametrize("function", compiled.functions())
def test_compiles_without_spilling(function):
    found = compiled.report(function)
    assert found
    print(*found, sep="\n")
    spilled = [str(launch) for launch in found if launch.stack > MOST_SPILLED]
    assert not spilled, "\n".join(spilled)


def test_no_kernel_is_left_out():
    assert compiled.launched() == compiled.kernels()

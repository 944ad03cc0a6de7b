"""Configurations of another package's kernels, shared out among processes that compile them."""

import time

import pytest

pytest.importorskip("triton")

from triton.runtime.autotuner import Autotuner, Config

import ahead


class Kernel:
    """Stands for a compiled function: it notes what it is asked for."""

    def __init__(self):
        self.asked = []

    @staticmethod
    def fn(x, n, BLOCK):
        """What Triton looks for below an autotuner."""

    def run(self, *arguments, warmup, grid, **options):
        self.asked.append((arguments, warmup, options["BLOCK"]))
        if options["BLOCK"] == 8:
            raise RuntimeError("too small")


def walked(rank, ranks, until):
    """What one of `ranks` processes compiles of two calls, the first of which is repeated."""
    kernel = Kernel()
    tuner = Autotuner(kernel, ["x", "n", "BLOCK"], [Config({"BLOCK": 8 << i}) for i in range(5)], ["n"], None, None)
    with ahead.shared(rank, ranks, until) as share:
        for n in (1, 1, 2):
            assert tuner.run("x", n, grid=(1,), warmup=False) is None
    return kernel.asked, share


def test_every_configuration_is_compiled_once_and_never_launched():
    later = time.time() + 60
    parts = [walked(rank, 3, later) for rank in range(3)]
    asked = [(arguments[1], block) for made, _ in parts for arguments, warmup, block in made if warmup]
    assert sorted(asked) == [(n, 8 << i) for n in (1, 2) for i in range(5)]
    assert all(warmup for made, _ in parts for _, warmup, _ in made)
    assert [share.met for _, share in parts] == [10] * 3
    assert sum(share.compiled for _, share in parts) == 8
    assert sum(share.refused for _, share in parts) == 2


def test_nothing_is_begun_too_late():
    asked, share = walked(0, 2, 0.0)
    assert not asked
    assert share == ahead.Share(met=10, late=5)

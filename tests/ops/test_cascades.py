"""Cascades of Einsums: what they count, on small ones counted by hand."""

import pytest

from regard import RegardError
from regard.ops.cascades import Cascade, Einsum

SIZES = {"m": 10, "p": 3}
MEAN = Einsum("S", ("p",), ("X",), "add")
CENTRED = Einsum("C", ("m", "p"), ("X", "S"), "add")


def cascade(*einsums):
    return Cascade({"X": ("m", "p"), "Y": ("m", "p")}, einsums, {})


def test_a_reduction_fed_back_to_what_it_was_made_of_closes_a_pass():
    assert cascade(MEAN).passes("m") == 1
    assert cascade(MEAN, CENTRED).passes("m") == 2
    squares = Einsum("V", ("p",), ("C",), "add")
    scaled = Einsum("N", ("m", "p"), ("C", "V"), "divide")
    assert cascade(MEAN, CENTRED, squares, scaled).passes("m") == 3
    assert cascade(MEAN, CENTRED, squares, scaled).passes("p") == 1


def test_a_reduction_fed_to_another_fibre_closes_none():
    assert cascade(MEAN, Einsum("C", ("m", "p"), ("Y", "S"), "multiply")).passes("m") == 1


def test_counts_of_a_mean_that_is_taken_off():
    found = cascade(MEAN, CENTRED)
    assert found.operations(SIZES) == {"add": 60}
    assert found.traffic(SIZES, "m") == {"X": 60, "Y": 0, "C": 30}
    assert found.live_elements(SIZES, "m") == 3
    assert found.cycles(SIZES, width=2) == (15.0, 0.0)
    assert found.seconds(SIZES, "m", rate=60, bandwidth=1e9)[1] == "compute"
    assert found.seconds(SIZES, "m", rate=1e9, bandwidth=180) == (1.0, "memory")


@pytest.mark.parametrize(
    ("words", "einsums"),
    [("Einsum 'C' reads 'S', which is computed later: a cycle", (CENTRED, MEAN)),
     ("Einsum 'Z' reads 'W', which is no tensor of the cascade", (Einsum("Z", ("p",), ("W",), "add"),)),
     ("tensor 'S' of the cascade is named twice", (MEAN, MEAN))],
)  # fmt: skip
def test_cascades_that_cannot_run_are_named(words, einsums):
    with pytest.raises(RegardError, match=words):
        cascade(*einsums)


def test_unknown_ranks_and_missing_sizes_are_named():
    with pytest.raises(RegardError, match="unknown rank 'k' of the cascade; known: m, p"):
        cascade(MEAN).passes("k")
    with pytest.raises(RegardError, match="rank 'm' has no size; sizes are given for p"):
        cascade(MEAN).operations({"p": 3})

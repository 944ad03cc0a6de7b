"""The cost model of [133], at its own numbers."""

import pytest

from regard.core.errors import RegardError
from regard.models import cost, layouts

SIZE = {"width": 1024, "heads": 8, "length": 2048}


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        ("softmax", 2 * 2048 * 1024),
        ("hgrn", 5 * 1024),
        ("retnet", 5 * 1024 * 128),
        ("gla", 7 * 1024 * 128),
        ("hgrn2", 7 * 1024 * 128),
        ("delta_net", 8 * 1024 * 128),
        ("gated_delta_net", 8 * 1024 * 128),
    ],
)
def test_a_layer(mixer, expected):
    assert cost.per_token(mixer, **SIZE) == expected


def test_a_decoder():
    """Three to one: a quarter of the layers grows with the text."""
    names = layouts.ratio("gla", 3, layers=8)
    assert cost.decoder(names, **SIZE) == 6 * 7 * 1024 * 128 + 2 * 2 * 2048 * 1024
    longer = cost.decoder(names, **{**SIZE, "length": 4096})
    assert longer - cost.decoder(names, **SIZE) == 2 * 2 * 2048 * 1024


def test_no_published_cost():
    with pytest.raises(RegardError, match="gives no cost for mixer 'kda'"):
        cost.per_token("kda", **SIZE)

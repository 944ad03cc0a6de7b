"""Constraints, the front, the space, and what is chosen: no model is run."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard import catalog
from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.search.constraints import objectives, parse, parse_all
from regard.search.front import dominates, front, spread_out
from regard.search.plan import Plan
from regard.search.results import Row, Study, members
from regard.search.space import Space, read, tell, words

COSTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), max_size=14)


@given(COSTS)
def test_front_is_what_brute_force_says(costs):
    got = front(costs)
    for i, row in enumerate(costs):
        beaten = any(all(a <= b for a, b in zip(o, row, strict=True)) and o != row for o in costs)
        first = costs.index(row) == i
        assert (i in got) == (not beaten and first)


@given(COSTS)
def test_front_does_not_depend_on_order_and_is_its_own_front(costs):
    best = {costs[i] for i in front(costs)}
    assert best == {costs[::-1][i] for i in front(costs[::-1])}
    assert len(front(sorted(best))) == len(best)


def test_dominance_is_strict_and_nan_is_never_on_the_front():
    assert not dominates((1, 2), (1, 2))
    assert dominates((1, 2), (1, 3))
    assert front([(math.nan, 0.0), (1.0, 1.0)]) == [1]
    assert front([]) == []


def test_spread_out_takes_extremes_first():
    costs = [(0.0, 10.0), (1.0, 9.0), (5.0, 5.0), (9.0, 1.0), (10.0, 0.0)]
    assert spread_out(costs, [0], 2) == [0, 4]
    assert spread_out(costs, [0, 4], 3) == [0, 4, 2]
    assert sorted(spread_out(costs, [2], 9)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("byte<=0.4", "Did you mean 'bytes'"),
        ("bytes=0.4", "has not the form"),
        ("bytes<=many", "has not the form"),
        ("bytes>=0.4", "did you mean 'bytes<=0.4'"),
        ("recall<=0.9", "did you mean 'recall>=0.9'"),
        ("latency<=1", "unknown score"),
        ("", "has not the form"),
    ],
)
def test_bad_constraints_say_what_is_meant(written, said):
    with pytest.raises(RegardError, match=said.replace("(", r"\(")):
        parse(written)


def test_constraints():
    bytes_, recall = parse(" bytes <= 0.4 "), parse("recall>=.9")
    assert bytes_.met({"bytes": 0.4})
    assert not parse("bytes<0.4").met({"bytes": 0.4})
    assert bytes_.violation({"bytes": 0.5}) == pytest.approx(0.1)
    assert recall.violation({"recall": 0.8}) == pytest.approx(0.1)
    assert not recall.met({})
    assert not bytes_.met({"bytes": math.nan})
    assert [str(c) for c in parse_all("bytes<=0.4, kl<0.05")] == ["bytes<=0.4", "kl<0.05"]
    with pytest.raises(RegardError, match="more than once"):
        parse_all(["bytes<=0.4", "bytes<=0.3"])
    with pytest.raises(RegardError, match="Did you mean 'decode'"):
        objectives(["kl", "decoding"])
    with pytest.raises(RegardError, match="different scores"):
        objectives(["kl", "kl"])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"trials": 0}, "trials must be"),
        ({"windws": 2}, "Did you mean 'windows'"),
        ({"seconds": -1}, "positive"),
        ({"sampler": "nsga"}, "Did you mean 'nsga2'"),
        ({"final_length": 100, "continuation": 128}, "final_length"),
    ],
)
def test_bad_plans(written, said):
    with pytest.raises(RegardError, match=said):
        Plan.of(**written)


class Draws:
    """Optuna's trial, drawing at random; a draw must always offer the same choices."""

    offered: dict

    def __init__(self, rng):
        self.rng, self.params = rng, {}

    def suggest_categorical(self, name, choices):
        assert Draws.offered.setdefault(name, tuple(choices)) == tuple(choices)
        self.params.setdefault(name, self.rng.choice(list(choices)))
        return self.params[name]


def space(layers=12, **more):
    return Space(tuple(catalog.entries().values()), layers, **more)


def test_every_draw_is_legal():
    Draws.offered = {}
    known = catalog.entries()
    for seed in range(300):
        placed = space(order={"saw_int4": list(range(12))[::-1]}).suggest(Draws(random.Random(seed)))
        claims = set()
        for place in placed:
            entry = known[place.stem]
            catalog.check_options(entry, place.options)
            layers = range(12) if place.layers == "all" else place.layers
            for verb, layer in itertools.product(entry.verbs, layers):
                name = (place.stem if verb == "allow" else verb, layer)
                assert name not in claims
                claims.add(name)


def test_the_most_sensitive_layers_are_spared():
    order = [5, 3, 1, 0, 2, 4]
    fixed = {"keep": "none", "encode": "saw_int4", "use.streaming": False, "saw_int4.spare": 2}
    fixed |= {"saw_int4.key_bits": 4, "saw_int4.value_bits": 4, "saw_int4.rotate_v": False}
    fixed |= {"saw_int4.key_bits.spared": 8, "saw_int4.value_bits.spared": 4}
    Draws.offered = {}
    draw = Draws(random.Random(0))
    draw.params = fixed
    coarse, fine = space(6, order={"saw_int4": order}).suggest(draw)
    assert fine.layers == (3, 5)
    assert fine.options["key_bits"] == 8
    assert coarse.layers == (0, 1, 2, 4)
    assert coarse.options["key_bits"] == 4


def test_neutral_settings_place_nothing():
    fixed = {"keep": "none", "encode": "saw_int4", "use.streaming": False}
    fixed |= {"saw_int4.key_bits": 16, "saw_int4.value_bits": 16}
    Draws.offered = {}
    draw = Draws(random.Random(0))
    draw.params = fixed
    assert space().suggest(draw) == []


def test_starts_begin_with_dense_and_can_be_drawn():
    starts = space(30).starts()
    drawn = []
    for params in starts:
        Draws.offered = {}
        draw = Draws(random.Random(0))
        draw.params = dict(params)
        drawn.append(tell(space(30).suggest(draw)))
        assert draw.params == params, "a start leaves a draw to chance"
    assert drawn[0] == []
    assert any(len({p["mechanism"] for p in d}) > 1 for d in drawn)
    eight = [p for d in drawn for p in d if p["options"].get("key_bits") == 8]
    assert {len(p["layers"]) for p in eight} >= {10, 20}


def test_placements_survive_json():
    placed = [Placement("saw_int4", (0, 2), "all", {"key_bits": 4}), Placement("streaming", "all", (1,), {"sink": 4})]
    assert read(tell(placed), {}) == placed
    assert words([], 4) == "dense"
    assert words(tell(placed), 4) == "saw_int4(key_bits 4) on 2 of 4 layers + streaming(sink 4)"


def row(number, kl, share, final=None, dense=False):
    def told(kl, share, length):
        return {"scores": {"kl": kl, "bytes": share}, "length": length}

    placed = [] if dense else [{"mechanism": "m", "layers": "all", "heads": "all", "options": {"n": number}}]
    again = told(*final, 3000) if final else None
    return Row(number, placed, None, told(kl, share, 1024), 1.0, again)


def study(rows, constraints):
    return Study(tuple(rows), ("kl", "bytes"), tuple(parse_all(constraints)), 4)


DENSE = row(0, 0.0, 1.0, dense=True)


def test_the_chosen_row_is_decided_at_the_final_length():
    rows = [DENSE, row(1, 0.02, 0.39, (0.021, 0.42)), row(2, 0.05, 0.35, (0.04, 0.36)), row(3, 0.3, 0.1)]
    assert study(rows, "bytes<=0.4").chosen.number == 2
    assert study(rows, "bytes<=0.4").shortfall() is None


def test_the_chosen_row_is_best_in_what_no_constraint_bounds():
    rows = [DENSE, row(1, 0.01, 0.5), row(2, 0.04, 0.3), row(3, 0.3, 0.1)]
    assert study(rows, "kl<=0.05").chosen.number == 2
    assert study(rows, "bytes<=0.6").chosen.number == 1
    assert study(rows, "bytes<=0.6,kl<=0.05").chosen.number == 1
    assert study(rows, "").chosen.number in (1, 2)
    assert study([DENSE], "").chosen is None


def test_a_constraint_nobody_meets_says_how_near_the_front_came():
    rows = [DENSE, row(1, 0.01, 0.5), row(2, 0.04, 0.3)]
    got = study(rows, ["bytes<=0.2", "kl<=0.02"])
    assert got.chosen is None
    assert got.nearest() == {"bytes<=0.2": (0.3, 2), "kl<=0.02": (0.01, 1)}
    assert "bytes<=0.2: 0.3 (trial 2)" in got.shortfall()
    with pytest.raises(RegardError, match="nothing on the front meets"):
        _ = got.recipe
    assert "no trial could be measured" in study([DENSE], "bytes<=0.2").shortfall()


def test_members_are_on_the_front_and_hold_the_best():
    rows = [DENSE, *(row(i, 1 / i, i / 10) for i in range(1, 10)), row(10, 5.0, 0.9)]
    got = study(rows, "bytes<=0.4")
    picked = members(got, 4)
    assert len(picked) == 4
    assert picked[0] == got.chosen
    assert {r.number for r in picked} <= {r.number for r in got.front}
    assert members(study([DENSE], ""), 4) == []


def test_every_combination_that_meets_the_constraints_is_measured_again():
    """A beaten row of another mechanism may be the better one at length: short trials flatter windows."""
    other = Row(
        9,
        [{"mechanism": "o", "layers": "all", "heads": "all", "options": {}}],
        None,
        row(9, 0.05, 0.35).measurement,
        1.0,
    )
    rows = [DENSE, row(1, 0.02, 0.3), row(2, 0.04, 0.2), row(3, 0.1, 0.1), other]
    got = study(rows, "bytes<=0.4")
    assert other not in got.front
    assert members(got, 3)[:2] == [rows[1], other]

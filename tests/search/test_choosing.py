"""Constraints, the front, the space, and what is chosen: no model is run."""

import io
import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from regard import catalog
from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.search.constraints import objectives, parse, parse_all
from regard.search.front import dominates, front, spread_out
from regard.search.plan import Plan
from regard.search.progress import Table
from regard.search.results import DENSE, Row, Study, members
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
    assert front([(0.0, 2.0), (math.nan, 0.0), (0.0, 1.0)]) == [2]  # nor does it hide who beats whom


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
    return Space(tuple(e for e in catalog.attachable().values() if e.card.saving != "none"), layers, **more)


def test_every_draw_is_legal():
    Draws.offered = {}
    known = catalog.attachable()
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
    fixed = {"use.duo": False, "use.saw_int4": True, "use.streaming": False, "saw_int4.spare": 2}
    fixed |= {"saw_int4.key_bits": 4, "saw_int4.value_bits": 4, "saw_int4.rotate_v": False}
    fixed |= {"saw_int4.key_bits.spared": 8, "saw_int4.value_bits.spared": 4}
    Draws.offered = {}
    draw = Draws(random.Random(0))
    draw.params = {f"use.{stem}": False for stem in catalog.attachable()} | fixed
    coarse, fine = space(6, order={"saw_int4": order}).suggest(draw)
    assert fine.layers == (3, 5)
    assert fine.options["key_bits"] == 8
    assert coarse.layers == (0, 1, 2, 4)
    assert coarse.options["key_bits"] == 4


def test_neutral_settings_place_nothing():
    fixed = {"use.duo": False, "use.saw_int4": True, "use.streaming": False}
    fixed |= {"saw_int4.key_bits": 16, "saw_int4.value_bits": 16}
    Draws.offered = {}
    draw = Draws(random.Random(0))
    draw.params = {f"use.{stem}": False for stem in catalog.attachable()} | fixed
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


DENSE_ROW = row(0, 0.0, 1.0, dense=True)


def test_the_chosen_row_is_decided_at_the_final_length():
    rows = [DENSE_ROW, row(1, 0.02, 0.39, (0.021, 0.42)), row(2, 0.05, 0.35, (0.04, 0.36)), row(3, 0.3, 0.1)]
    assert study(rows, "bytes<=0.4").chosen.number == 2
    assert study(rows, "bytes<=0.4").shortfall() is None


def test_the_chosen_row_is_best_in_what_no_constraint_bounds():
    rows = [DENSE_ROW, row(1, 0.01, 0.5), row(2, 0.04, 0.3), row(3, 0.3, 0.1)]
    assert study(rows, "kl<=0.05").chosen.number == 2
    assert study(rows, "bytes<=0.6").chosen.number == 1
    assert study(rows, "bytes<=0.6,kl<=0.05").chosen.number == 1
    assert study(rows, "").chosen.number in (1, 2)
    assert study([DENSE_ROW], "").chosen is None


def test_a_constraint_nobody_meets_says_how_near_the_front_came():
    rows = [DENSE_ROW, row(1, 0.01, 0.5), row(2, 0.04, 0.3)]
    got = study(rows, ["bytes<=0.2", "kl<=0.02"])
    assert got.chosen is None
    assert got.nearest() == {"bytes<=0.2": (0.3, 2), "kl<=0.02": (0.01, 1)}
    assert "bytes<=0.2: 0.3 (trial 2)" in got.shortfall()
    with pytest.raises(RegardError, match="nothing on the front meets"):
        _ = got.recipe
    assert "no trial could be measured" in study([DENSE_ROW], "bytes<=0.2").shortfall()


def test_members_are_on_the_front_and_hold_the_best():
    rows = [DENSE_ROW, *(row(i, 1 / i, i / 10) for i in range(1, 10)), row(10, 5.0, 0.9)]
    got = study(rows, "bytes<=0.4")
    picked = members(got, 4)
    assert len(picked) == 4
    assert picked[0] == got.chosen
    assert {r.number for r in picked} <= {r.number for r in got.front}
    assert members(study([DENSE_ROW], ""), 4) == []


def test_every_combination_that_meets_the_constraints_is_measured_again():
    """A beaten row of another mechanism may be the better one at length: short trials flatter windows."""
    other = Row(
        9,
        [{"mechanism": "o", "layers": "all", "heads": "all", "options": {}}],
        None,
        row(9, 0.05, 0.35).measurement,
        1.0,
    )
    rows = [DENSE_ROW, row(1, 0.02, 0.3), row(2, 0.04, 0.2), row(3, 0.1, 0.1), other]
    got = study(rows, "bytes<=0.4")
    assert other not in got.front
    assert members(got, 3)[:2] == [rows[1], other]


def test_the_continued_search_measures_the_same_rows_again():
    rows = [DENSE_ROW, row(1, 0.02, 0.3), row(2, 0.04, 0.2), row(3, 0.1, 0.1), row(4, 0.01, 0.39)]
    first = [r.number for r in members(study(rows, "bytes<=0.4"), 2)]
    finals = {4: (0.5, 0.39), 2: (0.01, 0.1), 3: (0.2, 0.05)}
    after = [row(r.number, *r.scores.values(), finals.get(r.number)) if not r.dense else r for r in rows]
    assert [r.number for r in members(study(after, "bytes<=0.4"), 2)] == first


SCORES = ("kl", "bytes", "top1")
LEVELS = st.lists(
    st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan])] * 3, st.booleans()), min_size=1, max_size=9
)
ASKED = st.sampled_from(["", "bytes<=0.5", "top1>=0.5", "kl<=0.5,bytes<=0.5", "kl<=0", "top1>=1,bytes<=0.25"])
WANTED = st.sampled_from([("kl", "bytes"), ("bytes", "kl"), ("kl",), ("kl", "bytes", "top1"), ("top1", "bytes")])


def made(levels, wanted, asked):
    """A study of rows with these scores at the final length, all equal in the trials; dense comes first."""
    one = {"scores": {"kl": 0.1, "bytes": 0.5, "top1": 0.5}, "length": 1024}
    rows = [Row(0, [], None, {"scores": {n: DENSE[n] for n in SCORES}, "length": 1024}, 1.0)]
    for number, (*scores, again) in enumerate(levels, 1):
        placed = [{"mechanism": "m", "layers": "all", "heads": "all", "options": {"n": number}}]
        final = {"scores": dict(zip(SCORES, scores, strict=True)), "length": 3000} if again else None
        rows.append(Row(number, placed, None, one, 1.0, final))
    return Study(tuple(rows), wanted, tuple(parse_all(asked)), 4)


@given(LEVELS, WANTED, ASKED)
def test_the_final_front_is_what_brute_force_says_and_holds_the_chosen_row(levels, wanted, asked):
    got = made(levels, wanted, asked)
    names = {*wanted, *(c.name for c in got.constraints)}
    finals = {r.number: r.final["scores"] for r in got.rows if r.final}
    whole = {n: [s[k] * (-1 if k == "top1" else 1) for k in sorted(names)] for n, s in finals.items()}
    if finals:
        whole[0] = [DENSE[k] * (-1 if k == "top1" else 1) for k in sorted(names)]
    whole = {n: cost for n, cost in whole.items() if not any(map(math.isnan, cost))}
    unbeaten = {
        n
        for n, a in whole.items()
        if not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in whole.values())
    }
    found = {r.number for r in got.final_front}
    assert found <= unbeaten
    assert {tuple(whole[n]) for n in found} == {tuple(whole[n]) for n in unbeaten}
    told = {r["number"]: r for r in got.to_json()["rows"]}
    assert {n for n, r in told.items() if r["final_front"]} == found
    if not finals:
        return
    meeting = {n for n in unbeaten - {0} if all(c.met(finals[n]) for c in got.constraints)}
    if got.chosen is None:
        # Nothing to choose, or only what equals dense.
        assert all(whole[n] == whole[0] for n in meeting)
        assert got.shortfall()
        return
    assert got.chosen.number in found & meeting
    bounded = {c.name for c in got.constraints}
    lead = next((n for n in wanted if n not in bounded), wanted[0])
    if got.constraints:
        best = min(v[sorted(names).index(lead)] for n, v in whole.items() if n in meeting & found)
        assert whole[got.chosen.number][sorted(names).index(lead)] == best


def test_the_chosen_row_may_be_beaten_in_the_trials_but_not_at_the_final_length():
    rows = [DENSE_ROW, row(1, 0.01, 0.25, (0.1, 0.09)), row(2, 0.03, 0.36, (0.02, 0.36)), row(3, 0.3, 0.1)]
    rows.append(row(4, 0.04, 0.39, (0.03, 0.38)))
    got = study(rows, "bytes<=0.4")
    assert [r.number for r in got.front] == [0, 1, 3]
    assert [r.number for r in got.final_front] == [0, 2, 1]
    assert got.chosen.number == 2
    assert study([DENSE_ROW, row(3, 0.3, 0.1)], "").final_front == []


def test_what_dense_beats_is_never_chosen():
    """Slower than dense, and farther from it: no recipe at all is the better choice."""

    def timed(number, kl, decode):
        told = {"scores": {"kl": kl, "bytes": 0.3, "decode": decode}, "length": 3000}
        return Row(number, row(number, kl, 0.3).placements, None, told, 1.0, told)

    def asked(*rows):
        return Study((DENSE_ROW, *rows), ("kl", "decode"), tuple(parse_all("kl<=0.1")), 4)

    slow, fast = timed(1, 0.01, 1.5), timed(2, 0.05, 0.9)
    assert asked(slow).chosen is None
    assert "the model's own attention is as good as every recipe that meets kl<=0.1" in asked(slow).shortfall()
    assert asked(slow, fast).chosen is fast
    assert [r.number for r in asked(slow, fast).final_front] == [0, 2]
    cheap = Study((DENSE_ROW, slow), ("kl", "decode"), tuple(parse_all("bytes<=0.4")), 4)
    assert cheap.chosen is slow  # what is constrained counts


@pytest.mark.parametrize("width", [44, 80, 240])
def test_the_table_fits_and_marks_what_is_chosen_and_on_the_front(width):
    rows = [DENSE_ROW, row(1, 0.01, 0.25, (0.1, 0.09)), row(2, 0.03, 0.36, (0.02, 0.36)), row(3, 0.3, 0.1)]
    rows.append(row(4, 0.04, 0.39, (0.03, 0.38)))
    long = [dict(rows[2].placements[0], options={f"option_{i}": i for i in range(12)})]
    rows[2] = Row(2, long, None, rows[2].measurement, 1.0, rows[2].final)
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(Table(study(rows, "bytes<=0.4")))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    figured = [line.split() for line in lines if "%" in line]
    assert [words[:2] if words[0] in "*o" else words[:1] for words in figured] == [
        ["o", "1"],
        ["*", "2"],
        ["4"],
        ["o", "0"],
        ["3"],
    ]
    assert "0.0200" in figured[1]
    assert any("not measured again" in line for line in lines)
    # What a row is stands beside its figures or below them, never folded into shreds.
    beside = [line for line in lines if "%" in line and "option_0" in line]
    assert bool(beside) == (width == 240)
    assert sum("option_" in line for line in lines) <= (1 if width == 240 else 6)

"""What a recipe owes to each of its mechanisms, against the very same measurements made by hand."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from regard.core.errors import RegardError
from regard.search import attribution
from regard.search.book import name_of
from regard.search.plan import Plan
from regard.search.progress import Table
from regard.search.results import Row, Study
from regard.search.space import tell
from regard.search.study import search
from search.fakes import CALIBRATION, LAYERS, SMALL, Fake, Letters, measurement, tiny_model, tiny_text

MODEL, TEXT = tiny_model(), tiny_text()


class Steady(Fake):
    """Two mechanisms that both always pay, and whose settings all differ: most recipes of both are on the front."""

    def __call__(self, placements, *, final):
        self.calls.append((placements, final))
        kl, share = 0.0, 1.0
        for place in placements:
            layers = 1 if place.layers == "all" else len(place.layers) / LAYERS
            strength = sum(1 / (2 + value) for value in place.options.values() if value) * layers
            kl, share = kl + strength**2, share * (1 - strength / 3)
        return measurement(kl, share, 96 if final else 64)


def run(out, **more):
    given = {"mechanisms": ["saw_int4", "streaming"], "calibration": CALIBRATION, "measure": Steady(), "trials": 14}
    given |= {"constraints": ["bytes<=0.9"], "final_members": 6}
    return search(MODEL, Letters(), TEXT, out=out, progress=False, **{**given, **SMALL, **more})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    fake = Steady()
    study = run(tmp_path_factory.mktemp("attribution"), measure=fake)
    return study, [name_of(tell(placed)) for placed, final in fake.calls if not final]


def place(stem, layers="all", **options):
    return {"mechanism": stem, "layers": layers, "heads": "all", "options": options}


def row(number, placements, kl, share, **more):
    told = {"scores": {"kl": kl, "bytes": share}, "length": 64}
    return Row(number, placements, None, told, 1.0, told, **more)


A, B, C = place("a"), place("b"), place("c", (0, 1))
DENSE_ROW = Row(0, [], None, {"scores": {"kl": 0.0, "bytes": 1.0}, "length": 64}, 1.0)


def test_every_member_of_several_mechanisms_is_explained(done):
    study, fake = done[0], Steady()
    several = [r for r in study.final_front if len({p["mechanism"] for p in r.placements}) > 1]
    assert several
    assert {r.number for r in study.rows if r.owes} == {r.number for r in several}
    for member in several:
        here = fake(study.placements(member), final=False).scores()
        assert set(member.owes) == {p["mechanism"] for p in member.placements}
        for stem, told in member.owes.items():
            rest = [p for p in study.placements(member) if p.stem != stem]
            there = fake(rest, final=False).scores()
            assert told["without"] == pytest.approx({n: there[n] for n in study.criteria})
            assert told["change"] == pytest.approx({n: there[n] - here[n] for n in study.criteria})
            better = all(there[n] <= here[n] for n in study.criteria)
            assert told["pays"] != better


def test_nothing_is_measured_twice(done):
    study, calls = done
    assert len(set(calls)) == len(calls)
    variants = {name_of(attribution.without(r.placements, s)) for r in study.rows if r.owes for s in r.owes}
    trials = {name_of(r.placements) for r in study.rows}
    assert variants & trials, "nothing here shows that trials are taken"
    assert variants - trials, "nothing here shows that variants are measured"
    assert set(calls) == variants | trials


def test_a_continued_study_measures_no_variant_again(tmp_path):
    run(tmp_path)
    fake = Steady()
    again = run(tmp_path, measure=fake)
    assert fake.calls == []
    assert any(r.owes for r in again.rows)
    told = json.loads((tmp_path / "study.json").read_text())
    assert {r["number"] for r in told["rows"] if r["owes"]} == {r.number for r in again.rows if r.owes}


def test_the_count_is_bounded(tmp_path):
    fake = Steady()
    study = run(tmp_path, measure=fake, attributions=0)
    assert sum(not final for _, final in fake.calls) == len(study.rows)
    with pytest.raises(RegardError, match="attributions must be a whole number"):
        Plan.of(attributions=-1)


def test_only_what_is_not_known_is_measured_and_no_more_than_asked():
    both, three = row(1, [A, B], 0.1, 0.3), row(2, [A, B, C], 0.2, 0.1)
    alone = row(3, [A], 0.05, 0.6)
    study = Study((DENSE_ROW, both, three, alone), ("kl", "bytes"), (), LAYERS)
    names = [name for name, _ in attribution.missing(study, (), 99)]
    # Without b, the first is row 3; without c, the second is row 1.
    assert sorted(names) == sorted(map(name_of, ([B], [B, C], [A, C])))
    assert len(list(attribution.missing(study, (), 2))) == 2
    assert [name for name, _ in attribution.missing(study, names[:1], 99)] == names[1:]


def test_a_mechanism_that_does_not_pay_is_pointed_out():
    member = row(1, [A, B, C], 0.1, 0.3)
    measured = {
        name_of([B, C]): {"scores": {"kl": 0.05, "bytes": 0.7}},
        name_of([A, C]): {"scores": {"kl": 0.09, "bytes": 0.3}},
        name_of([A, B]): {"reason": "out of memory"},
    }
    owed = attribution.owes(member, measured, ("kl", "bytes"))
    assert [told.get("pays") for told in owed.values()] == [True, False, None]
    assert attribution.words(owed) == (
        "a +0.0500 KL, -40.0 % bytes; b +0.0100 KL, +0.0 % bytes (does not pay); "
        "c not known: the rest could not be measured"
    )
    assert attribution.owes(member, {}, ("kl",)) == {}
    # Equal in everything: it costs nothing and brings nothing.
    same = attribution.owes(row(1, [A, B], 0.1, 0.3), {name_of([B]): {"scores": {"kl": 0.1, "bytes": 0.3}}}, ("kl",))
    assert same["a"]["pays"] is False


def test_what_fails_without_a_mechanism_is_told(tmp_path):
    class Fragile(Steady):
        ready = False

        def __call__(self, placements, *, final):
            self.ready |= final
            if self.ready and not final:
                raise RegardError("it was the keystone")
            return super().__call__(placements, final=final)

    study = run(tmp_path, measure=Fragile())
    reasons = {told.get("reason") for r in study.rows if r.owes for told in r.owes.values()}
    assert "it was the keystone" in reasons
    assert study.chosen is not None


@pytest.mark.parametrize("width", [44, 240])
def test_the_table_says_what_a_row_owes(width):
    member = row(1, [A, B], 0.1, 0.3)
    owed = attribution.owes(member, {name_of([B]): {"scores": {"kl": 0.05, "bytes": 0.7}}}, ("kl", "bytes"))
    study = Study((DENSE_ROW, replace(member, owes=owed)), ("kl", "bytes"), (), LAYERS)
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(Table(study))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "owes: a +0.0500 KL, -40.0 % bytes" in " ".join(" ".join(lines).split())

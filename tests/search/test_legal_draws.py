"""Only legal combinations are measured: on made-up mechanisms that clash, refuse a model, or refuse an option."""

import json
import random

import pytest

import mechanisms
from regard import catalog
from regard.adapters.bind import bind
from regard.adapters.families import open_decoder
from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.recipes.legal import Legality, judge, stand_ins
from regard.search.calibration import Calibration, calibrate
from regard.search.report import render
from regard.search.space import Space, sparing, tell
from regard.search.study import search
from search.fakes import LAYERS, SMALL, Letters, measurement, tiny_model, tiny_text
from search.test_choosing import Draws

MODEL = tiny_model()
DECODER = open_decoder(MODEL)
REAL = ("duo", "saw_int4", "streaming")


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    return mechanisms.install(tmp_path / "ops", monkeypatch)


@pytest.fixture
def space(fakes):
    entries = [e for e in (*fakes.values(), *map(catalog.find, REAL)) if e.stem != "picky"]
    gates = {"duo": stand_ins(catalog.find("duo"), DECODER)}
    return Space(tuple(entries), LAYERS, tensors=gates, legal=judge(entries, DECODER, gates))


def score(placements, *, final):
    """KL and bytes made up from what is placed; more mechanisms save more and lose more."""
    stems = {place.stem for place in placements}
    number = sum(1 if p.layers == "all" else len(p.layers) / LAYERS for p in placements)
    detail = sum(hash(json.dumps(dict(p.options), sort_keys=True, default=str)) % 97 for p in placements) / 1e5
    return measurement(0.01 * number + detail, 1 / (1 + len(stems)) + detail, 96 if final else 64)


class Fixed:
    """A trial that takes what it was told, and nothing else."""

    def __init__(self, params):
        self.params = params

    def suggest_categorical(self, name, choices):
        assert self.params[name] in choices
        return self.params[name]


class Measures:
    def __init__(self):
        self.calls = []

    def __call__(self, placements, *, final):
        bind(placements, DECODER)
        self.calls.append((placements, final))
        return score(placements, final=final)

    def control(self):
        return None


def run(out, entries, **more):
    given = {"calibration": Calibration(), "measure": Measures(), "trials": 12, "constraints": ["bytes<=0.9"]}
    return search(
        MODEL, Letters(), tiny_text(), mechanisms=entries, out=out, progress=False, **{**given, **SMALL, **more}
    )


def test_placements_lead_back_to_their_draw(space):
    Draws.offered = {}
    for seed in range(60):
        placed = space.suggest(Draws(random.Random(seed)))
        params = space.draw(placed)
        assert tell(space.suggest(Fixed(params))) == tell(placed)
    with pytest.raises(RegardError, match=r"cannot begin with streaming.*never draws; the nearest .* is streaming"):
        space.draw([Placement("streaming", options={"sink": 3, "window": 17})])


def test_a_search_begins_with_what_it_is_given(fakes, tmp_path):
    chosen = [fakes["miser"], fakes["cipher"]]
    first = run(tmp_path / "one", chosen, trials=4)
    wanted = [first.placements(row) for row in first.front if not row.dense]
    again = run(tmp_path / "two", chosen, trials=6, begin_with=[*wanted, first.recipe])
    assert [list(row.placements) for row in again.rows[: len(wanted)]] == [
        list(row.placements) for row in first.front if not row.dense
    ]


def test_rivals_share_one_draw(space):
    assert [[e.stem for e in group] for group in space.groups] == [
        ["hoard", "miser", "duo"],
        ["cipher", "saw_int4"],
        ["planner"],
        ["odd"],
        ["streaming"],
    ]


def test_no_draw_holds_two_that_clash(space):
    Draws.offered = {}
    seen = set()
    for seed in range(300):
        placed = space.suggest(Draws(random.Random(seed)))
        stems = sorted({place.stem for place in placed})
        assert all(space.legal.clash(a, b) is None for a in stems for b in stems if a != b), stems
        seen.update(stems)
        # What is left to refuse is an option's value, never a combination.
        reason = space.refusal(placed)
        assert (reason is None) == (not any(p.stem == "odd" and p.options["n"] == 1 for p in placed))
        if reason is None:
            bind(placed, DECODER)
    assert seen == {entry.stem for entry in space.entries}


def test_what_clashes_with_some_of_a_group_narrows_its_draw(space):
    """Beside `streaming` two of three can stand: they are offered under a name of their own."""
    more = {("streaming", "miser"): "made up", ("streaming", "planner"): "made up"}
    entries = sorted(space.entries, key=lambda e: (e.stem != "streaming", e.stem != "planner"))
    legal = Legality({}, space.legal.pairs | more, DECODER)
    narrowed = Space(tuple(entries), LAYERS, tensors=space.tensors, legal=legal)
    Draws.offered = {}
    for stem in ("streaming", "planner"):
        drawn = Draws(random.Random(0))
        drawn.params = {"one of streaming, planner": stem, "streaming.window": 128}
        narrowed.suggest(drawn)
    assert Draws.offered["one of hoard, duo"] == ("none", "hoard", "duo")
    assert Draws.offered["one of hoard, miser, duo"] == ("none", "hoard", "miser", "duo")


def test_starts_are_legal_and_no_more_than_asked(space):
    starts = space.starts()
    for params in starts:
        Draws.offered = {}
        draw = Draws(random.Random(0))
        draw.params = dict(params)
        placed = space.suggest(draw)
        assert draw.params == params, "a start leaves a draw to chance"
        assert space.refusal(placed) is None
    assert space.starts(4) == starts[:4]
    assert not any(p.get("odd.n") == 1 for p in starts if p.get("use.odd"))


def test_a_whole_model_is_never_spared(fakes, tmp_path):
    planner, streaming = fakes["planner"], catalog.find("streaming")
    assert not sparing(planner)
    assert sparing(streaming)
    Draws.offered = {}
    for seed in range(40):
        for place in Space((planner,), LAYERS).suggest(Draws(random.Random(seed))):
            assert place.layers == "all"
    assert set(Draws.offered) == {"use.planner", "planner.n"}


def test_only_what_can_be_spared_is_probed(fakes, monkeypatch):
    probed = []

    def probe(model, tokens, entry, layers, report):
        probed.append(entry.stem)
        return tiny_text()[:LAYERS].double()

    monkeypatch.setattr("regard.search.calibration.probe", probe)
    chosen = [fakes["planner"], fakes["hoard"], *map(catalog.find, ("selective", "mergelock", "streaming"))]
    found = calibrate(MODEL, tiny_text(), chosen, LAYERS)
    assert probed == ["hoard", "streaming"] == sorted(found.sensitivity)


def test_a_probe_takes_a_setting_that_can_be_served(fakes):
    """The coarsest setting of `odd` is refused on every model."""
    from regard.search.calibration import probe

    found = probe(MODEL, tiny_text()[:100], fakes["odd"], LAYERS, lambda *_: None)
    assert found.shape == (LAYERS,)
    assert (found > 0).all()


def test_refused_draws_cost_no_trial_and_are_told(fakes, tmp_path):
    measures = Measures()
    study = run(tmp_path / "out", [fakes["odd"], fakes["hoard"], fakes["miser"]], measure=measures)
    assert len([r for r in study.rows if not r.dense]) == 12
    assert all(r.reason is None for r in study.rows)
    assert not any(p.stem == "odd" and p.options["n"] == 1 for placed, _ in measures.calls for p in placed)
    told = json.loads((tmp_path / "out" / "study.json").read_text())["facts"]
    assert told["refused_draws"]
    assert {draw["reason"] for draw in told["refused_draws"]} == {"'odd' needs n of at least 2"}
    assert all("odd(n 1)" in draw["words"] for draw in told["refused_draws"])
    (pair,) = told["refused_pairs"]
    assert pair["mechanisms"] == ["hoard", "miser"]
    assert "both keep layer 0 head 0" in pair["reason"]
    assert "both keep layer 0 head 0" in (tmp_path / "out" / "report.html").read_text()


def test_three_that_clash_only_together_are_drawn_again(fakes, tmp_path, monkeypatch):
    def crowded(placements, decoder):
        if len({place.stem for place in placements}) > 2:
            raise RegardError("three is a crowd")
        return bind(placements, decoder)

    monkeypatch.setattr("regard.recipes.legal.bind", crowded)
    three = [fakes["hoard"], catalog.find("streaming"), catalog.find("saw_int4")]
    study = run(tmp_path / "out", three, trials=16)
    assert max(len({p["mechanism"] for p in row.placements}) for row in study.rows) == 2
    assert len([r for r in study.rows if r.measurement and not r.dense]) == 16
    assert {draw["reason"] for draw in study.facts["refused_draws"]} <= {"three is a crowd"}


def test_a_space_in_which_nothing_more_is_legal_comes_to_an_end(fakes, tmp_path):
    study = run(tmp_path / "out", [fakes["planner"]], trials=50)
    assert {json.dumps(r.placements[0]["options"]) for r in study.rows if not r.dense} == {'{"n": 4}', '{"n": 5}'}


def test_what_cannot_stand_is_left_out_unless_it_was_named(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr("regard.search.study.attachable", lambda: {n: fakes[n] for n in ("picky", "hoard")})
    study = run(tmp_path / "out", None, trials=3)
    reason = "'picky' needs 7 layers, this model has 6"
    assert study.facts["left_out"] == {"picky": reason}
    assert {p["mechanism"] for r in study.rows for p in r.placements} == {"hoard"}
    assert reason in render(study.to_json())
    with pytest.raises(RegardError, match=f"'picky' cannot stand on this model: {reason}"):
        run(tmp_path / "named", ["hoard", "picky"])
    assert not (tmp_path / "named").exists()
    monkeypatch.setattr("regard.search.study.attachable", lambda: {"picky": fakes["picky"]})
    with pytest.raises(RegardError, match="nothing to search: 'picky' needs 7 layers"):
        run(tmp_path / "none", None)


def test_what_cannot_be_fitted_is_left_out_unless_it_was_named(fakes, tmp_path, monkeypatch):
    def fit(model, tokens, progress=None):
        raise RegardError("nothing to fit here")

    monkeypatch.setattr("regard.search.calibration.fitter", lambda entry: fit if entry.stem == "duo" else None)
    known = {"duo": catalog.find("duo"), "planner": fakes["planner"]}
    monkeypatch.setattr("regard.search.study.attachable", lambda: known)
    study = run(tmp_path / "out", None, trials=2, calibration=None)
    assert study.facts["left_out"] == {"duo": "nothing to fit here"}
    assert {p["mechanism"] for r in study.rows for p in r.placements} == {"planner"}
    with pytest.raises(RegardError, match="nothing to fit here"):
        run(tmp_path / "named", ["duo"], calibration=None)

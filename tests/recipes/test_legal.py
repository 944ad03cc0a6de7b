"""What can stand on a model: every answer is checked against what `bind` says of the very placements."""

import itertools

import pytest

import mechanisms
from families import tiny
from regard import catalog
from regard.adapters.bind import bind
from regard.adapters.families import open_decoder
from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.recipes.legal import Fault, faults, judge, neutral, refusal, settings, stand_ins, together, told


@pytest.fixture(scope="module")
def llama():
    return open_decoder(tiny("llama"))


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    return mechanisms.install(tmp_path, monkeypatch)


def served(decoder, *placements):
    try:
        bind(placements, decoder)
    except RegardError:
        return False
    return True


def test_real_mechanisms_alone_and_in_pairs(llama):
    entries = list(catalog.attachable().values())
    got = judge(entries, llama)
    for entry in entries:
        tried = [Placement(entry.stem, options=o, tensors=stand_ins(entry, llama)) for o in settings(entry)]
        assert got.allows(entry.stem) == any(served(llama, place) for place in tried)
    assert "both decide how the keys of layer 0 are read" in got.clash("act", "dhsa")
    assert "lets heads of layer 0 hold different ones" in got.clash("s2", "dhsa")
    assert "lets rows pass by" in got.clash("iri", "adsc")
    for one, other in itertools.combinations(entries, 2):
        clash = got.clash(one.stem, other.stem)
        assert clash == got.clash(other.stem, one.stem)
        if got.allows(one.stem) and got.allows(other.stem):
            able = [
                [place for o in settings(e) if served(llama, place := Placement(e.stem, options=o, tensors=t))]
                for e, t in ((e, stand_ins(e, llama)) for e in (one, other))
            ]
            assert (clash is None) == any(served(llama, *both) for both in itertools.product(*able)), (one, other)


def test_a_family_refuses_and_its_reason_is_kept(llama):
    entries = [catalog.find("mergelock"), catalog.find("saw_int4")]
    qwen = open_decoder(tiny("qwen3"))
    assert judge(entries, llama).alone == {}
    assert judge(entries, qwen).alone == {"mergelock": refusal([Placement("mergelock")], qwen)}
    assert "normalised after projection" in judge(entries, qwen).alone["mergelock"]


def test_made_up_mechanisms(llama, fakes):
    entries = [*fakes.values(), catalog.find("duo"), catalog.find("saw_int4"), catalog.find("streaming")]
    got = judge(entries, llama)
    assert got.alone == {"picky": f"'picky' needs 7 layers, this model has {llama.layers}"}
    refused = {frozenset(pair) for pair in got.pairs}
    keeps = [frozenset(pair) for pair in itertools.combinations(("hoard", "miser", "duo"), 2)]
    assert refused == {*keeps, frozenset(("cipher", "saw_int4"))}
    assert "both keep layer 0 head 0" in got.clash("miser", "hoard")
    assert not got.allows("picky")
    assert not got.allows("hoard", ["streaming", "miser"])
    assert got.allows("hoard", ["streaming", "saw_int4"])
    assert got.to_json()["refused_pairs"][0]["mechanisms"] == ["hoard", "miser"]


def test_a_pair_is_refused_only_if_no_setting_can_be_served(llama, fakes, monkeypatch):
    """Here `odd` cannot stand at its default, and not at 2 beside `hoard`; at 3 it can."""

    def stubborn(placements, decoder):
        placed = {place.stem: place.options for place in placements}
        if "hoard" in placed and placed.get("odd") == {"n": 2}:
            raise RegardError("not at 2")
        return bind(placements, decoder)

    monkeypatch.setattr("regard.recipes.legal.bind", stubborn)
    got = judge([fakes["hoard"], fakes["odd"]], llama)
    assert (got.alone, got.pairs) == ({}, {})


def test_settings_are_never_neutral_where_others_are_not():
    for entry in catalog.attachable().values():
        assert not any(neutral(entry, options) for options in settings(entry)), entry.stem
        for options in settings(entry):
            catalog.check_options(entry, options)


def test_stand_ins_are_legal_tensors(llama):
    for entry in catalog.attachable().values():
        for name, tensor in stand_ins(entry, llama).items():
            option = entry.card.options[name]
            assert tensor.shape == option.sizes(llama)
            assert option.low is None or float(tensor.min()) >= option.low
            assert option.high is None or float(tensor.max()) <= option.high


def test_faults_of_a_recipe(llama, fakes):
    streaming, hoard = Placement("streaming"), Placement("hoard")
    miser, picky = Placement("miser", (0, 2)), Placement("picky")
    assert faults([], llama) == []
    assert faults([streaming, hoard, Placement("saw_int4")], llama) == []
    assert faults([hoard, Placement("miser", (1,)), Placement("hoard", (0,))], llama) == [
        Fault((0, 1), refusal([hoard, Placement("miser", (1,))], llama)),
        Fault((0, 2), refusal([hoard, Placement("hoard", (0,))], llama)),
    ]
    assert [fault.placements for fault in faults([picky, hoard, streaming, miser], llama)] == [(0,), (1, 3)]
    assert [fault.placements for fault in faults([picky], llama)] == [(0,)]
    assert faults([Placement("hoard", (0,)), Placement("miser", (1, 2))], llama) == []


def test_three_that_only_together_cannot_be_served(llama, fakes, monkeypatch):
    def crowded(placements, decoder):
        if len({place.stem for place in placements}) > 2:
            raise RegardError("three is a crowd")
        return bind(placements, decoder)

    monkeypatch.setattr("regard.recipes.legal.bind", crowded)
    three = [Placement("hoard"), Placement("streaming"), Placement("saw_int4")]
    assert faults(three, llama) == [Fault((0, 1, 2), "three is a crowd")]
    answers = together([catalog.find(place.stem) for place in three], llama)
    assert [stems for stems, reason in answers.items() if reason] == [("hoard", "streaming", "saw_int4")]
    assert len(answers) == 3 + 3 + 1


def test_together_at_the_defaults(llama, fakes):
    answers = together([fakes["odd"], fakes["hoard"], fakes["miser"]], llama)
    assert answers[("odd",)] == "'odd' needs n of at least 2"
    assert answers[("hoard",)] is None
    assert "both keep" in answers[("hoard", "miser")]
    assert list(answers) == [("odd",), ("hoard",), ("miser",), ("hoard", "miser")]
    assert together([fakes["hoard"]], llama) == {("hoard",): None}


def test_a_placement_in_words():
    assert told(Placement("streaming")) == "streaming"
    assert told(Placement("streaming", (4, 2, 0, 3), (1,))) == "streaming on layers 0, 2-4, KV heads 1"

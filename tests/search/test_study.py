"""Searches from begin to end on a tiny model: budgets, failures, kills, several processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from regard.core.errors import RegardError
from regard.recipes.recipe import Recipe
from regard.search.calibration import Calibration, calibrate
from regard.search.results import DENSE
from regard.search.study import search
from search.fakes import CALIBRATION, SMALL, Fake, Letters, measurement, tiny_model, tiny_text

MODEL, TEXT = tiny_model(), tiny_text()


def run(out, **more):
    given = {"mechanisms": ["saw_int4", "streaming"], "calibration": CALIBRATION, "measure": Fake(), "trials": 12}
    return search(MODEL, Letters(), TEXT, **{**given, "out": out, "progress": False, **SMALL, **more})


def test_a_search_counts_its_trials_and_writes_its_files(tmp_path):
    study = run(tmp_path)
    counted = [r for r in study.rows if not r.dense]
    assert len(counted) == 12
    assert len({json.dumps(r.placements) for r in study.rows}) == len(study.rows)
    dense = [r for r in study.rows if r.dense]
    assert len(dense) == 1
    assert dense[0].scores["kl"] == 0.0
    assert Recipe.load(tmp_path / "recipe.yaml").digest == study.recipe.digest
    assert study.chosen.final_scores["bytes"] <= 0.4
    files = {p.name for p in (tmp_path / "front").glob("*.yaml")}
    assert files == {f"trial-{r.number:03d}.yaml" for r in (*study.front, *study.contenders) if not r.dense}
    told = json.loads((tmp_path / "study.json").read_text())
    assert told["chosen"] == study.chosen.number
    assert study.chosen in study.final_front
    assert {r["number"] for r in told["rows"] if r["final_front"]} == {r.number for r in study.final_front}
    assert len(told["rows"]) == len(study.rows)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_few_rows_are_measured_again(tmp_path):
    fake = Fake()
    study = run(tmp_path, measure=fake, final_members=3)
    again = [r for r in study.rows if r.final]
    assert len(again) == 3
    assert sum(final for _, final in fake.calls) == 3
    assert study.chosen in again


def test_what_fails_is_recorded_and_the_search_goes_on(tmp_path):
    reasons = [r.reason for r in run(tmp_path, trials=30).rows if r.reason]
    assert any(r.startswith("out of memory") for r in reasons)
    assert any("yields NaN" in r for r in reasons)
    assert any("kl is NaN" in r for r in reasons)


def test_a_row_that_is_nan_at_the_final_length_is_not_chosen(tmp_path):
    class Late(Fake):
        def __call__(self, placements, *, final):
            found = super().__call__(placements, final=final)
            bad = final and sum(f for _, f in self.calls) == 1
            return measurement(math.nan, found.bytes.ratio, 96) if bad else found

    study = run(tmp_path, measure=Late(), final_members=3)
    reasons = study.facts["failed_finals"]
    assert list(reasons.values()) == ["kl is NaN"]
    assert {r.number for r in study.rows if r.final}.isdisjoint(map(int, reasons))
    assert study.chosen in study.final_front


def test_a_search_continues_and_measures_nothing_twice(tmp_path):
    first = run(tmp_path, trials=5)
    fake = Fake()
    second = run(tmp_path, trials=9, measure=fake)
    assert second.rows[: len(first.rows)][0] == first.rows[0]
    assert {r.number for r in first.rows} <= {r.number for r in second.rows}
    assert sum(not final for _, final in fake.calls) == 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"context": 40}, "plan"),
        ({"mechanisms": ["saw_int4"]}, "space"),
        ({"objectives": ["kl", "bytes", "top1"]}, "plan"),
        ({"calibration": Calibration()}, "calibration"),
    ],
)
def test_a_study_of_other_settings_is_refused(tmp_path, changed, said):
    run(tmp_path, trials=2)
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(RegardError, match=f"begun under other settings.*{said}"):
        run(tmp_path, **changed)
    assert (tmp_path / "study.json").read_bytes() == before
    with pytest.raises(RegardError, match="text:"):
        search(
            MODEL, Letters(), TEXT[1:], mechanisms=["saw_int4", "streaming"], calibration=CALIBRATION, measure=Fake(),
            out=tmp_path, progress=False, **SMALL,
        )  # fmt: skip


def test_a_constraint_nobody_meets(tmp_path):
    study = run(tmp_path, constraints=["bytes<=0.01"])
    assert study.chosen is None
    assert "Nearest: trial" in study.shortfall()
    assert not (tmp_path / "recipe.yaml").exists()
    assert "nothing on the front meets bytes" in (tmp_path / "report.html").read_text()


def test_a_budget_of_seconds(tmp_path):
    began = time.monotonic()
    study = run(tmp_path, trials=500, seconds=1.0, measure=Fake(sleep=0.2), final_members=0)
    assert time.monotonic() - began < 30
    assert 1 <= len(study.rows) <= 6


def test_ctrl_c_keeps_what_is_finished_and_returns_it(tmp_path):
    class Impatient(Fake):
        def __call__(self, placements, *, final):
            if len(self.calls) == 4:
                raise KeyboardInterrupt
            return super().__call__(placements, final=final)

    study = run(tmp_path, measure=Impatient())
    assert study.interrupted
    assert len(study.rows) == 4
    assert (tmp_path / "report.html").exists()
    after = run(tmp_path)
    assert len([r for r in after.rows if not r.dense]) == 12
    assert {json.dumps(r.placements) for r in study.rows} <= {json.dumps(r.placements) for r in after.rows}


def test_bad_arguments_touch_nothing(tmp_path):
    out = tmp_path / "none"
    for wrong, said in (
        ({"mechanisms": ["saw_int"]}, "Did you mean 'saw_int4'"),
        ({"constraints": ["bites<=1"]}, "bytes"),
        ({"final_length": 5000}, "are needed"),
        ({"storage": "oracle+nothing://x"}, "cannot be opened|driver"),
        ({"out": None}, "needs a storage"),
    ):
        with pytest.raises(RegardError, match=said):
            run(**{"out": out, **wrong})
    assert not list(out.glob("*")) if out.exists() else True


def test_the_package_can_be_called(tmp_path):
    import regard.search.study  # the package is imported, and the name still searches

    assert regard.search.study.search is search
    with pytest.raises(RegardError, match="unknown search setting"):
        regard.search(MODEL, Letters(), TEXT, out=tmp_path, windoes=3)


def test_a_real_search_on_the_tiny_model(tmp_path):
    study = run(tmp_path, measure=None, calibration=None, trials=4, objectives=["kl", "bytes", "decode"])
    assert all(r.reason is None for r in study.rows), [r.reason for r in study.rows]
    dense = next(r for r in study.rows if r.dense)
    assert dense.scores["kl"] == 0.0
    assert dense.scores["bytes"] == 1.0
    exact = {n: v for n, v in DENSE.items() if n not in ("prefill", "decode")}
    assert {n: dense.scores[n] for n in exact} == pytest.approx(exact)
    assert "recall" in study.at_final(dense)
    # A window wider than the tiny text loses nothing; rounding always does.
    assert all(r.scores["kl"] > 0 for r in study.rows if any(p["mechanism"] == "saw_int4" for p in r.placements))
    assert all({"prefill", "decode", "recall"} <= set(r.final_scores) for r in study.rows if r.final)
    assert study.control is not None
    assert (tmp_path / "calibration.safetensors").exists()
    assert MODEL.config._attn_implementation != "regard"


def test_calibration_is_cached_by_model_and_text(tmp_path, monkeypatch):
    from regard import catalog

    entries = [catalog.find("saw_int4")]
    path, tokens = tmp_path / "c.safetensors", TEXT[:200]
    first = calibrate(MODEL, tokens, entries, 6, cache=path, key="a")
    assert first.sensitivity["saw_int4"].shape == (6,)
    assert (first.sensitivity["saw_int4"] > 0).all()
    monkeypatch.setattr("regard.search.calibration.probe", lambda *_: torch.full((6,), 7.0, dtype=torch.float64))
    assert calibrate(MODEL, tokens, entries, 6, cache=path, key="a").digest == first.digest
    assert calibrate(MODEL, tokens, entries, 6, cache=path, key="b").digest != first.digest
    path.write_bytes(b"broken")
    assert calibrate(MODEL, tokens, entries, 6, cache=path, key="b").sensitivity["saw_int4"][0] == 7.0


def test_a_mechanism_fitted_on_text_is_fitted_and_placed(tmp_path):
    # Letters enough for the two windows of 512 that its fit needs.
    given = {"mechanisms": ["selective"], "calibration": None, "calibration_tokens": 1024, "constraints": ()}
    study = search(MODEL, Letters(), TEXT.repeat(2), out=tmp_path, measure=Fake(), trials=2, progress=False,
                   **SMALL | given)  # fmt: skip
    placed = [place for row in study.rows for place in row.placements]
    assert {place["mechanism"] for place in placed} == {"selective"}
    assert set(study.tensors["selective"]) == {"betas", "query_map", "value_map"}


def test_a_mechanism_fitted_on_more_than_text_is_refused_by_name():
    needs = "'soft_injection' is fitted on prompts, queries, targets, and a search has only text; fit it with regard"
    with pytest.raises(RegardError, match=needs):
        search(MODEL, Letters(), TEXT, mechanisms=["saw_int4", "soft_injection"], out=None, storage="sqlite://")
    with pytest.raises(RegardError, match="'kda' replaces the product"):
        search(MODEL, Letters(), TEXT, mechanisms=["saw_int4", "kda"], out=None, storage="sqlite://")


CHILD = """
import sys
from search.fakes import CALIBRATION, SMALL, Fake, Letters, tiny_model, tiny_text
from regard.search.study import search
out, storage, trials, sleep = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
study = search(tiny_model(), Letters(), tiny_text(), mechanisms=["saw_int4", "streaming"], calibration=CALIBRATION,
               measure=Fake(sleep=sleep), trials=trials, out=out, storage=storage, progress=False, **SMALL)
print(len([r for r in study.rows if not r.dense]))
"""


def child(out, storage, trials, sleep):
    here = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(out), str(storage), str(trials), str(sleep)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def complete(storage):
    import optuna

    if not storage.exists():
        return []
    try:
        study = optuna.load_study(study_name="regard", storage=f"sqlite:///{storage}")
    except Exception:
        return []
    return [t for t in study.get_trials() if t.state.name == "COMPLETE"]


def wait_for(condition, seconds=90.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.2)
    pytest.fail("waited in vain")


@pytest.mark.slow
def test_sigkill_loses_no_finished_trial(tmp_path):
    storage = tmp_path / "study.db"
    victim = child(tmp_path, storage, 12, 0.5)
    wait_for(lambda: len(complete(storage)) >= 4)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    finished = {t.number: (t.values, t.params) for t in complete(storage)}
    assert 4 <= len(finished) < 12
    study = run(tmp_path, storage=storage)
    after = {t.number: (t.values, t.params) for t in complete(storage)}
    assert finished.items() <= after.items()
    assert len([r for r in study.rows if not r.dense]) == 12
    assert set(finished) <= {r.number for r in study.rows}


@pytest.mark.slow
def test_two_processes_search_one_study(tmp_path):
    storage = tmp_path / "shared.db"
    both = [child(tmp_path / name, storage, 12, 0.3) for name in "ab"]
    counts = [int(p.communicate(timeout=240)[0]) for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert counts == [12, 12]
    import optuna

    trials = optuna.load_study(study_name="regard", storage=f"sqlite:///{storage}").get_trials()
    own = [t for t in trials if "same_as" not in t.user_attrs and t.user_attrs.get("placements")]
    assert len({t.user_attrs["recipe"] for t in own}) == len(own) == 12
    assert len({t.user_attrs["owner"]["pid"] for t in own}) == 2
    told = [json.loads((tmp_path / n / "study.json").read_text()) for n in "ab"]
    assert told[0]["chosen"] == told[1]["chosen"]

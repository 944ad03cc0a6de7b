import json
import re
from dataclasses import replace

import pytest

from regard.core.pages import embed
from regard.search.report import render
from regard.search.study import search
from search.fakes import CALIBRATION, LAYERS, SMALL, Fake, Letters, tiny_model, tiny_text

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    model, mechanisms = tiny_model(), ["saw_int4", "streaming"]
    return search(
        model,
        Letters(),
        tiny_text(),
        mechanisms=mechanisms,
        calibration=CALIBRATION,
        measure=Fake(),
        out=out,
        progress=False,
        trials=16,
        **SMALL,
    )


@pytest.fixture(scope="module")
def browser(chromium):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def page(browser, study, request):
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=request.param)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((study.folder / "report.html").as_uri())
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


def shown(page):
    """The picture's cells as (sink, recent, key, value), column by column."""
    cells = page.locator("#picture .cell").all()
    return [tuple(c.get_attribute(f"data-{a}") for a in ("sink", "recent", "key", "value")) for c in cells]


def told(study, row):
    """The same from the placements themselves."""
    found = []
    for layer in range(LAYERS):
        sink, recent, key, value = "0", "all", "raw", "raw"
        for place in study.placements(row):
            if place.layers != "all" and layer not in place.layers:
                continue
            if place.stem == "streaming":
                sink, recent = str(place.options["sink"]), str(place.options["window"])
            else:
                bits = [place.options["key_bits"], place.options["value_bits"]]
                turned = [" hadamard 16", " hadamard 16" if place.options["rotate_v"] else ""]
                key, value = ("raw" if b == 16 else f"int{b}{t}" for b, t in zip(bits, turned, strict=True))
        found += [(sink, recent, key, value)] * 2
    return found


def test_points_rows_and_opening(page, study):
    assert page.locator(".point[data-trial]").count() == len(study.rows)
    assert page.locator(".point.failed[data-trial]").count() == sum(r.reason is not None for r in study.rows) > 0
    assert page.locator(".point[data-final]").count() == sum(r.final is not None for r in study.rows) > 0
    assert page.locator("#trials tbody tr").count() == len(study.rows)
    assert page.locator(".point.chosen[data-trial]").get_attribute("data-trial") == str(study.chosen.number)
    assert page.locator(".point.early").count() == sum(r.final is not None for r in study.rows)
    assert "Trial" in page.locator("#detail h3").inner_text()
    wide = "e => e.scrollWidth - e.clientWidth"
    assert page.locator("#detail").evaluate(wide) <= 0
    assert page.locator("html").evaluate(wide) <= 0


def test_a_click_selects_and_the_picture_follows(page, study):
    for row in [r for r in study.rows if r.measurement and not r.dense][:6]:
        page.locator(f"[data-row='{row.number}']").click()
        assert page.locator("#detail h3").inner_text() == f"Trial {row.number}"
        assert page.locator(".point.selected[data-trial]").get_attribute("data-trial") == str(row.number)
        assert shown(page) == told(study, row)
    page.locator(f".point[data-trial='{study.chosen.number}']").click()
    assert shown(page) == told(study, study.chosen)
    assert page.locator("#trials tr.selected").get_attribute("data-row") == str(study.chosen.number)


def centres(page, selector):
    """Where the points that `selector` finds are in the chart."""
    circles = [p.locator(".hit") for p in page.locator(selector).all()]
    return [(round(float(c.get_attribute("cx")), 1), round(float(c.get_attribute("cy")), 1)) for c in circles]


def corners(page, selector):
    """The rows that a line of steps goes through: its beginning, and where each upright part ends."""
    first, *steps = re.findall(r"M([-\d.]+) ([-\d.]+)|H([-\d.]+)V([-\d.]+)", page.locator(selector).get_attribute("d"))
    return [(round(float(x), 1), round(float(y), 1)) for x, y in [first[:2], *(step[2:] for step in steps)]]


def at_length(row):
    """`row` as if the final length had turned out worse by an amount that depends on the recipe."""
    if not row.final:
        return row
    scores = {**row.final_scores, "kl": row.final_scores["kl"] * (1.3 + row.number / 10) + 0.01}
    return replace(row, final={**row.final, "scores": scores})


def test_both_fronts_are_drawn_and_the_star_is_on_the_final_one(browser, study, tmp_path):
    study = replace(study, rows=tuple(map(at_length, study.rows)))
    assert study.chosen in study.final_front
    (tmp_path / "report.html").write_text(render(study.to_json()))
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    for name in ("front at 96 tokens, other text", "front at 64 tokens, searched on"):
        assert name in page.locator("#legend").inner_text()
    star, early = f".point.chosen[data-trial='{study.chosen.number}']", f"[data-early='{study.chosen.number}']"
    assert page.locator(f"{star} polygon").count() == 1
    assert page.locator(f"{early} polygon").count() == 0
    on_final = [c for r in study.final_front for c in centres(page, f".point[data-trial='{r.number}']")]
    assert sorted(on_final) == sorted(corners(page, "#chart path.steps.final"))
    on_first = [c for r in study.front for c in centres(page, f"[data-{'early' if r.final else 'trial'}='{r.number}']")]
    assert sorted(on_first) == sorted(corners(page, "#chart path.steps.first"))
    late, before = centres(page, star), centres(page, early)
    assert late != before
    assert late[0] in corners(page, "#chart path.steps.final")
    page.locator("#show-final").uncheck()
    assert page.locator("#chart path.steps").count() == 1
    assert page.locator(".point[data-final]").count() == 0
    assert page.locator(f"{star} polygon").count() == 1
    page.close()


def test_the_card_says_which_front(page, study):
    for row in [r for r in study.rows if r.measurement]:
        page.locator(f"[data-row='{row.number}']").click()
        tags = page.locator("#detail .tag").all_inner_texts()
        assert ("on the front at 96" in tags) == (row in study.final_front)
        assert ("on the front at 64" in tags) == (row in study.front)


def test_long_words_stay_inside(browser, study, tmp_path):
    told = study.to_json()
    for row in told["rows"]:
        row["words"] = " + ".join(["a_mechanism(" + "option_" * 12 + " 4)"] * 6)
    (tmp_path / "long.html").write_text(render(told))
    for width in (375, 1200):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto((tmp_path / "long.html").as_uri())
        page.locator(".point.chosen[data-trial]").hover()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["height"] < 240
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()


def test_what_each_mechanism_brings(browser, study, tmp_path):
    told = study.to_json()
    row = next(r for r in told["rows"] if r["number"] == told["chosen"])
    row["owes"] = {
        "streaming": {"without": {}, "change": {"kl": -0.0102, "bytes": 0.41}, "pays": True},
        "saw_int4": {"without": {}, "change": {"kl": -0.2, "bytes": 0.0}, "pays": False},
        "duo": {"reason": "out of memory"},
    }
    (tmp_path / "owes.html").write_text(render(told))
    page = browser.new_page(viewport={"width": 375, "height": 800})
    page.goto((tmp_path / "owes.html").as_uri())
    assert page.locator("[data-stem=streaming] td").all_inner_texts() == ["+0.0102", "\N{MINUS SIGN}41.0 %"]
    assert [c.get_attribute("class") for c in page.locator("[data-stem=streaming] td").all()] == ["loss", "gain"]
    assert page.locator("[data-stem=saw_int4] td").all_inner_texts() == ["+0.20", "±0.0 %"]
    assert page.locator(".brings .tag").all_inner_texts() == ["does not pay"]
    assert "does not pay" in page.locator("[data-stem=saw_int4]").inner_text()
    assert "out of memory" in page.locator("[data-stem=duo]").inner_text()
    assert page.locator("#detail").evaluate("e => e.scrollWidth - e.clientWidth") <= 0
    page.close()


def test_what_was_not_possible(browser, study, tmp_path):
    told = study.to_json()
    told["facts"] |= {
        "left_out": {"locked": "it needs <another> model"},
        "refused_pairs": [{"mechanisms": ["one", "other"], "reason": "both keep layer 0"}],
        "refused_draws": [{"words": "one(n 1)", "reason": "not at 1"}, {"words": "one(n 2)", "reason": "nor at 2"}],
    }
    (tmp_path / "refused.html").write_text(render(told))
    page = browser.new_page(viewport={"width": 375, "height": 800})
    page.goto((tmp_path / "refused.html").as_uri())
    assert page.locator("#refused summary").inner_text() == "1 left out, 1 pair refused, 2 draws refused"
    assert not page.locator("#refused dd").first.is_visible()
    page.locator("#refused summary").click()
    assert page.locator("#refused dt").all_inner_texts() == ["locked", "one + other", "one(n 1)", "one(n 2)"]
    assert page.locator("#refused dd").first.inner_text() == "it needs <another> model"
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.goto((study.folder / "report.html").as_uri())
    assert not page.locator("#refused").is_visible()
    page.close()


def test_failed_trials_give_their_reason(page, study):
    row = next(r for r in study.rows if r.reason)
    page.locator(f".point[data-trial='{row.number}']").click()
    assert row.reason in page.locator("#detail").inner_text()
    assert page.locator("#picture .cell").count() == 0
    assert row.reason in page.locator(f"[data-row='{row.number}']").inner_text()


def test_keyboard_alone(page, study):
    first = page.locator(f".point[data-trial='{study.chosen.number}']")
    first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.trial") != str(study.chosen.number)
    assert page.locator("#detail h3").inner_text() != f"Trial {study.chosen.number}"


def test_sorting(page, study):
    page.locator("[data-sort='kl']").click()
    numbers = [int(r.get_attribute("data-row")) for r in page.locator("#trials tbody tr").all()]
    rows = {r.number: r for r in study.rows}
    kls = [rows[n].scores["kl"] for n in numbers if rows[n].scores]
    assert kls == sorted(kls)
    assert all(not rows[n].scores for n in numbers[len(kls) :])


def test_other_axes_and_a_phone(browser, study):
    page = browser.new_page(viewport={"width": 375, "height": 800})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((study.folder / "report.html").as_uri())
    page.locator("#axis-y").select_option("top1")
    assert page.locator(".point[data-trial]").count() == len(study.rows)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert errors == []
    page.close()


def test_data_cannot_leave_its_element():
    nasty = {"note": "</script><script>alert(1)</script><!-- &amp;", "nan": float("nan"), "inf": [float("inf")]}
    text = embed(nasty)
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"note": nasty["note"], "nan": None, "inf": [None]}
    page = render({"facts": {"model": {"name": "a/<b>%%DATA%%"}}, **nasty})
    assert "<b>" not in page
    assert page.count("alert(1)") == 1
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page

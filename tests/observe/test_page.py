"""The page of a record: what it says is what the tensors say, by mouse and by keyboard, at any length."""

import math
import time
from dataclasses import replace

import pytest
import torch

from regard.core.errors import RegardError
from regard.core.token_map import Span, TokenMap
from regard.observe import Record, Roles, page
from regard.ops.totals import edges

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
LAYERS, HEADS, LENGTH, PADDED = 3, 4, 40, 2
# Arrivals 4 to 19 are an image of 4 x 4 tokens.
IMAGE = Span(0, 4, 20, (1, 4, 4))
WORDS = [f" w{i}" for i in range(LENGTH - 2)] + ["</script>", "\n"]
FLOAT16 = 2**-11


def random_record(layers, heads, tokens, size=128, causal=True):
    """Random attention between tiles, and the readings that belong to it; one prompt."""
    random = torch.Generator().manual_seed(0)
    real, cuts = tokens.kinds != -1, edges(tokens.length, size)
    side = len(cuts) - 1
    seen = real[0][cuts[:-1]] & ((cuts[:-1] < cuts[1:, None]) | (not causal))
    scores = 3 * torch.randn(layers, 1, heads, side, side, generator=random)
    maps = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    kinds = {
        name: (tokens.kinds == kind)[0].float() for kind, name in enumerate(("first", "template", "query", "visual"))
    }
    shares = [torch.stack([part.mean() for part in one.split(cuts.diff().tolist())]) for one in kinds.values()]
    held = {
        "maps": maps,
        "masses": maps @ torch.stack(shares, -1),
        "entropy": -(maps * maps.clamp(min=1e-30).log()).sum(-1),
        "columns": (maps.mean(-2) / cuts.diff()).repeat_interleave(cuts.diff(), -1),
        "peaks": torch.rand(layers, 1, tokens.length, generator=random) * 25,
        "seen": torch.full((layers, 1, tokens.length), 9),
    }
    return Record(tokens, real, tuple(kinds), cuts, cuts, None, held)


@pytest.fixture(scope="module")
def record():
    kinds = torch.full((1, LENGTH), 2, dtype=torch.int8)
    kinds[0, :PADDED] = -1
    kinds[0, PADDED : IMAGE.start] = torch.tensor([0, 1], dtype=torch.int8)
    kinds[0, IMAGE.start : IMAGE.stop] = 3
    return random_record(LAYERS, HEADS, TokenMap(kinds, (IMAGE,)))


@pytest.fixture(scope="module")
def roles():
    scores = {name: torch.zeros(LAYERS, HEADS) for name in ("induction", "sink")}
    scores["induction"][1, 2], scores["sink"][1, 2], scores["sink"][0, 0] = 0.9, 0.7, 0.8
    return Roles(scores, {"induction": 0.5, "sink": 0.5})


@pytest.fixture(scope="module")
def browser(chromium):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens HTML in a window, which has asked for nothing and said nothing when the test ends."""
    said, asked, pages = [], [], []

    def open_page(html, **window):
        (tmp_path / "look.html").write_text(html, encoding="utf-8")
        shown = browser.new_page(**({"viewport": {"width": 1200, "height": 900}} | window))
        pages.append(shown)
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: asked.append(request.url))
        shown.goto((tmp_path / "look.html").as_uri())
        shown.wait_for_selector("html[data-ready]")
        return shown

    yield open_page
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    for shown in pages:
        shown.close()


def value(shown):
    """The value that is read out, and where: row, key."""
    told = shown.locator("#value")
    return float(told.get_attribute("data-value")), *(int(told.get_attribute(f"data-{a}")) for a in ("row", "key"))


def hover(shown, row, key, side=LENGTH):
    shown.locator("#map").scroll_into_view_if_needed()
    box = shown.locator("#map").bounding_box()
    shown.mouse.move(box["x"] + (key + 0.5) * box["width"] / side, box["y"] + (row + 0.5) * box["height"] / side)


def number(text):
    return float(text.replace("\N{MINUS SIGN}", "-"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_click_opens_a_head_whose_values_are_the_tensors(opened, record, roles, theme):
    shown = opened(page.render(record, WORDS, roles=roles), color_scheme=theme)
    assert shown.locator(".cell").count() == LAYERS * HEADS
    assert shown.locator("#head-heading").inner_text() == "Layer 1, head 2"  # the surest induction head
    for layer, head in ((0, 0), (2, 3)):
        shown.locator(f"[data-head='{layer}.{head}']").click()
        assert shown.locator("#head-heading").inner_text() == f"Layer {layer}, head {head}"
        for row, key in ((39, 5), (20, 20), (10, 3)):
            hover(shown, row, key)
            read = record.maps[layer, 0, head, row, key].item()
            assert value(shown) == (pytest.approx(read, rel=FLOAT16, abs=2**-25), row, key)
            text = shown.locator("#value").evaluate("e => e.firstChild.textContent")
            assert number(text) == pytest.approx(read, rel=FLOAT16 + 5e-4, abs=2**-24)
        told = shown.locator("#query").inner_text(), shown.locator("#key").inner_text()
        assert told == (
            "10 image 1, row 2, column 3",
            "3 \N{LEFT DOUBLE QUOTATION MARK} w3\N{RIGHT DOUBLE QUOTATION MARK} template",
        )
        hover(shown, 10, 30)
        assert shown.locator("#value").inner_text().startswith("not seen")


def test_facts_and_roles_of_a_head(opened, record, roles):
    shown = opened(page.render(record, WORDS, roles=roles))
    shown.locator("[data-head='1.2']").click()
    assert shown.locator("#marks .role").all_inner_texts() == ["I\ninduction\n0.90", "S\nsink\n0.70"]
    told = [float(cell.get_attribute("data-mean")) for cell in shown.locator("#facts [data-mean]").all()]
    masses, entropy = record.masses[1, 0, 2, PADDED:].mean(0), record.entropy[1, 0, 2, PADDED:].mean()
    assert told == pytest.approx([*masses.tolist(), entropy.item()], rel=1e-6)
    keys = shown.locator("#facts tr:has([data-share])")
    best = record.columns[1, 0, 2].topk(12)
    assert [int(key.locator(".at").inner_text()) for key in keys.all()] == best.indices.tolist()
    told = [float(cell.get_attribute("data-share")) for cell in shown.locator("#facts [data-share]").all()]
    assert told == best.values.tolist()
    assert "sink" in keys.first.inner_text()
    assert best.values[0] > 0.1
    assert not {"null", "undefined", "NaN"} & set(shown.locator("body").inner_text().split())
    # Roles are marked by shape and letter.
    assert shown.locator("[data-head='1.2'] svg text").all_text_contents() == ["I", "S"]
    shapes = {path.get_attribute("d") for path in shown.locator("#roles path").all()}
    assert len(shapes) == 2
    shown.locator("[data-role='induction']").click()
    dimmed = shown.locator(".cell").evaluate_all("cells => cells.filter((c) => !c.matches('.has')).length")
    assert dimmed == LAYERS * HEADS - 1
    shown.locator("#shows").select_option("1")
    assert "nats" in shown.locator("#scale-note").inner_text()


def test_keyboard_alone(opened, record, roles):
    shown = opened(page.render(record, WORDS, roles=roles))
    active = "document.activeElement.dataset.head || document.activeElement.id"
    for _ in range(5):
        shown.keyboard.press("Tab")
        if shown.evaluate(active) == "1.2":
            break
    assert shown.evaluate(active) == "1.2"
    shown.keyboard.press("ArrowDown")
    shown.keyboard.press("ArrowLeft")
    found = shown.evaluate(active)
    assert found != "1.2"
    layer, head = map(int, found.split("."))
    assert shown.locator("#head-heading").inner_text() == f"Layer {layer}, head {head}"
    assert shown.locator(":focus-visible").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    shown.keyboard.press("Enter")
    assert shown.evaluate(active) == "map"
    for key in ("Home", "ArrowUp", "Enter", *["ArrowRight"] * 5):
        shown.keyboard.press(key)
    assert value(shown) == (pytest.approx(record.maps[layer, 0, head, 38, 5].item(), rel=FLOAT16, abs=2**-25), 38, 5)
    assert shown.locator("#prompt-heading").inner_text() == "What token 38 reads"
    shown.keyboard.press("Escape")
    assert shown.evaluate(active) == found


def test_an_image_under_its_attention(opened, record):
    image = pytest.importorskip("PIL.Image").new("RGB", (64, 64), (200, 30, 30))
    shown = opened(page.render(record, WORDS, images=[image]), viewport={"width": 375, "height": 800})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 375
    assert "data:image/png" in shown.locator(".picture").evaluate("e => e.style.backgroundImage")
    map_row = record.maps[0, 0, 0, -1]
    picture = shown.locator(".picture canvas")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    shown.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.6)
    told = shown.locator("#images figcaption").inner_text()
    assert told.startswith("row 3, column 2")
    assert number(told.split(": ")[1]) == pytest.approx(map_row[IMAGE.start + 9].item(), rel=1e-3)
    assert "</script>" in shown.locator("#strip").inner_text()
    assert shown.locator("#strip .block").inner_text() == "image 1, 16 tokens"


@pytest.mark.parametrize(("layers", "heads", "whole"), [(30, 9, True), (16, 32, False)])
def test_a_page_of_32k_tokens(browser, tmp_path, layers, heads, whole):
    """It has less than 8 MB, and answers a click within 3 s of being opened."""
    kinds = torch.full((1, 32768), 2, dtype=torch.int8)
    names = [f" word{i}" for i in range(32768)]
    size = page.side(layers * heads, names)
    record = random_record(layers, heads, TokenMap(kinds), size=min(size, 128))
    html = page.render(record, names)
    assert 5_000_000 < len(html.encode()) < 8_000_000
    assert (size >= 128) == whole
    assert size > 90
    (tmp_path / "long.html").write_text(html, encoding="utf-8")
    seconds = []
    # The machine may be busy with other tests: what the page can do is the better of three.
    for _ in range(3):
        shown = browser.new_page()
        start = time.perf_counter()
        shown.goto((tmp_path / "long.html").as_uri())
        shown.locator("[data-head='3.4']").click()
        assert shown.locator("#head-heading").inner_text() == "Layer 3, head 4"
        seconds.append(time.perf_counter() - start)
        tiles = record.maps.shape[-1]
        hover(shown, tiles - 1, 7, side=tiles)
        assert value(shown)[0] == pytest.approx(record.maps[3, 0, 4, -1, 7].item(), rel=FLOAT16, abs=2**-25)
        shown.close()
        if seconds[-1] < 3:
            break
    assert min(seconds) < 3


def test_joined_tiles_hold_the_share_that_their_rows_give(opened, record):
    """Where a page has less room than the record has tiles, rows are averaged without padding and keys added up."""
    whole = len(page.render(record, WORDS).encode())
    shown = opened(page.render(record, WORDS, budget=whole - 18_000))
    side = shown.locator("#map").evaluate("e => e.width")
    assert 16 <= side < LENGTH
    cuts = [i * LENGTH // side for i in range(side + 1)]
    for row in (1, side // 2, side - 1):
        hover(shown, row, 1, side=side)
        rows = record.maps[0, 0, 0, max(cuts[row], PADDED) : cuts[row + 1], cuts[1] : cuts[2]]
        wanted = rows.sum(-1).mean().item() if len(rows) else 0
        assert shown.locator("#value").get_attribute("data-row") == str(row)
        assert value(shown)[0] == pytest.approx(wanted, rel=FLOAT16 * 2, abs=2**-24)


def test_attention_that_is_not_causal(opened):
    record = random_record(1, 1, TokenMap(torch.full((1, 20), 2, dtype=torch.int8)), causal=False)
    shown = opened(page.render(record, WORDS[:20]))
    hover(shown, 3, 15, side=20)
    assert value(shown)[0] == pytest.approx(record.maps[0, 0, 0, 3, 15].item(), rel=FLOAT16)


def test_bad_input(record):
    with pytest.raises(RegardError, match=f"{LENGTH} tokens, and there are 3 names"):
        page.render(record, WORDS[:3])
    with pytest.raises(RegardError, match="row 1 is not among"):
        page.render(record, WORDS, row=1)
    with pytest.raises(RegardError, match="do not hold maps of 12 heads"):
        page.render(record, WORDS, budget=30_000)
    with pytest.raises(RegardError, match="2 images are given"):
        page.render(record, WORDS, images=[None, None])
    broken = replace(record, held={**record.held, "maps": record.maps.clone()})
    broken.maps[2, 0, 1, 30, 3] = math.nan
    with pytest.raises(RegardError, match="maps of layer 2 head 1 are not finite"):
        page.render(broken, WORDS)

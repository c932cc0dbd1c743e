"""The report and the comparison in a real browser, opened as files."""

import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from reports import SCORES, example, png, write_results

from simvlg_jax.config.defaults import get_config
from simvlg_jax.evaluation.report.compare import write_comparison
from simvlg_jax.evaluation.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LAYERS = [[0, 1, 2, 3, 3], [0, 1, 2, 2, 2], [0, 1, 1, 1, 1]]
CARDS = 16

# Of the parts of a picture that are drawn, their numbers of tokens.
DRAWN = 'all => all.filter(each => getComputedStyle(each).display !== "none").map(each => each.dataset.tokens)'
# Of each visible text its contrast by WCAG 2, as {contrast, text}.
CONTRASTS = """() => {
  const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parse = (colour) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = colour;
    pixel.fillRect(0, 0, 1, 1);
    return pixel.getImageData(0, 0, 1, 1).data;
  };
  const brightness = (colour) => {
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = [...colour].map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const colour = parse(getComputedStyle(element).backgroundColor);
    return colour[3] === 255 ? colour : ground(element.parentElement);
  };
  const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const texts = [...document.querySelectorAll("body *:not(script)")].filter((e) => hasText(e) && e.checkVisibility());
  return texts.map((e) => {
    const style = getComputedStyle(e);
    const lights = [parse(e instanceof SVGElement ? style.fill : style.color), ground(e)].map(brightness);
    const contrast = (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
    return {contrast, text: e.textContent.trim().slice(0, 40)};
  });
}"""


def write_run(folder: Path, tokens: int, step: int, captions: list[str]) -> Path:
    examples = [
        example(
            place,
            references=[f"a dog number {place}", "w" * 90],
            caption=caption,
            score=(place * step % CARDS) / CARDS,
            loss=1.0 + place,
            image=png(),
            source_map=LAYERS[-1],
            layers=LAYERS,
            tokens=[["a", 0.5], [" dog", 5.0]],
        )
        for place, caption in enumerate(captions)
    ]
    scores = dict(headline="CIDEr", scores=SCORES, interval=[0.7, 0.9], shuffled={**SCORES, "CIDEr": 0.2})
    write_results(folder, **scores, visual_tokens=tokens, seconds_per_picture=0.01 * tokens, examples=examples)
    config = get_config()
    config.connector.tokens = tokens
    (folder / "config.json").write_text(config.to_json())
    steps = [f'{{"step": {step}, "kind": "train", "loss": {tokens / step}}}\n' for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(steps))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Returns the pages by name."""
    folder = tmp_path_factory.mktemp("pages")
    captions = [f"{'cat' if place % 2 else 'wolf'} and more {place}" for place in range(CARDS)]
    first = write_run(folder / "a-run-with-a-name-that-is-quite-long", 4, 7, captions)
    other = write_run(folder / "other", 2, 5, [caption + "x" * 70 for caption in captions])
    return {"report": write_report(first), "comparison": write_comparison([first, other], folder / "compare.html")}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install chromium to test the pages in a browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, pages):
    """Opens a page by its name. After the test, nothing is in the console, and only the page itself was requested."""
    contexts, said, requested = [], [], []

    def show(name, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(pages[name].as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert said == []
    own = {path.as_uri() for path in pages.values()}
    assert requested and {url for url in requested if not url.startswith("data:")} <= own


both = pytest.mark.parametrize("name", ["report", "comparison"])


def shown(page) -> list[int]:
    """Returns the places of the visible cards, from left to right and from top to bottom."""
    boxes = page.locator(".card").evaluate_all(
        """cards => cards.filter(card => card.checkVisibility()).map(card => {
          const box = card.getBoundingClientRect();
          return [Math.round(box.top), box.left, Number(card.dataset.place)];
        })"""
    )
    return [place for _, _, place in sorted(boxes)]


def values(page, key: str) -> list[float]:
    """Returns what the visible cards are sorted by, in their order."""
    return [float(page.locator(f'.card[data-place="{place}"]').get_attribute(f"data-{key}")) for place in shown(page)]


def press_tab_until(page, name: str) -> None:
    """Moves the focus to the element of a form with this name."""
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == name:
            return
    raise AssertionError(f"Tab does not reach {name}")


@both
def test_cards_are_searched_and_sorted_by_keyboard(show, name):
    page = show(name)
    assert shown(page) == list(range(CARDS))
    press_tab_until(page, "search")
    page.keyboard.type("MORE wolf")
    found = page.locator(".card:visible").all_inner_texts()
    assert len(found) == CARDS // 2 and all("wolf" in text for text in found)
    assert page.locator(".tools output").inner_text() == f"{CARDS // 2} of {CARDS} shown"
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    assert shown(page) == list(range(CARDS))
    press_tab_until(page, "sort")
    page.keyboard.press("ArrowDown")
    if name == "report":
        assert values(page, "score") == sorted(values(page, "score")) and len(set(values(page, "score"))) == CARDS
    else:
        changes = values(page, "change")
        assert changes == sorted(changes, reverse=True) and changes[0] > 0 > changes[-1]


def test_the_worst_quarter_is_chosen_by_keyboard(show):
    page = show("report")
    press_tab_until(page, "part")
    page.keyboard.press("ArrowDown")
    assert sorted(values(page, "score")) == [place / CARDS for place in range(CARDS // 4)]


def test_sliders_change_the_merge_map(show):
    page = show("report")
    cards = page.locator(".card")

    def drawn(card) -> tuple[list[str], int, str]:
        """The numbers of tokens of the visible layers, how many groups of lines there are, and what the slider says."""
        layers, lines = (card.locator(kind).evaluate_all(DRAWN) for kind in (".layer", ".lines"))
        return layers, len(lines), card.locator("output").inner_text()

    def picture(card) -> bytes:
        return card.locator("svg.map").screenshot()

    assert drawn(cards.first) == (["2"], 1, "3 of 3: 2 tokens")
    pictures = [picture(cards.first)]
    cards.first.locator("input").focus()
    for key, expected in (("Home", (["4"], 3, "1 of 3: 4 tokens")), ("ArrowRight", (["3"], 2, "2 of 3: 3 tokens"))):
        page.keyboard.press(key)
        assert drawn(cards.first) == expected
        pictures.append(picture(cards.first))
    assert len(set(pictures)) == 3
    assert drawn(cards.last) == (["2"], 1, "3 of 3: 2 tokens")
    page.locator("input[name=layer]").focus()
    page.keyboard.press("Home")
    assert drawn(cards.last) == drawn(cards.first) == (["4"], 3, "1 of 3: 4 tokens")


@both
def test_everything_can_be_read_without_scripts(show, name):
    page = show(name, java_script_enabled=False)
    assert not page.locator(".tools").is_visible()
    assert shown(page) == list(range(12))
    page.locator("details.others > summary").click()
    assert shown(page) == list(range(CARDS))
    folded = page.locator("details:not([open]) > summary")
    while folded.count():
        folded.first.click()
    text = page.locator("body").inner_text()
    for words in (*(f"more {place}" for place in range(CARDS)), "83.1", "70.0 to 90.0", "20.0", "connector.tokens"):
        assert words in text
    if name == "report":
        assert page.locator(".layer").evaluate_all(DRAWN) == ["2"] * CARDS  # the last layer


@both
def test_nothing_is_wider_than_a_phone(show, name):
    page = show(name, viewport={"width": 360, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@both
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(show, name, scheme):
    page = show(name, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    texts = page.evaluate(CONTRASTS)
    assert len(texts) > 100
    assert [text for text in texts if text["contrast"] < 4.5] == []
    grounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", grounds))) < 64) == (scheme == "dark")

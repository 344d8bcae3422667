"""The card's page as a data-protection officer meets it: in a browser, at a desk and on a telephone, and on paper.

Whatever names a user gave, they stand there as text; the page asks for nothing and runs nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from cards import LONG, NASTY, described, federated_card, one_dataset_card

from nnunet_dp import card_words
from nnunet_dp.card import MIXED_UNIT, Card, ClientLevelRow, miscounted, unit_of
from nnunet_dp.card_page import rendered
from nnunet_dp.claim import Claim
from nnunet_dp.clipping import RULE_NAMES
from nnunet_dp.errors import Refusal
from nnunet_dp.federated.claim import _fields, _row
from nnunet_dp.federated.new_run import LEFT_TO_SITES
from nnunet_dp.federated.protocol import Mode
from nnunet_dp.federated.summary import SiteSummary, Summary
from nnunet_dp.released_model import PAGE, README
from nnunet_dp.sections import DECLARED_WEIGHTS, NOT_COVERED

SECTIONS = {"claim", "attacker", "prices", "covered", "not-covered", "total", "curves", "method", "model"}
VARIANTS: dict[str, tuple[Callable[[], Card], tuple[str, ...]]] = {
    "one dataset": (one_dataset_card, ()),
    "names of a user": (lambda: one_dataset_card(public_inputs=[*NASTY, LONG + LONG[:60]]), NASTY),
    "federated": (federated_card, ()),
    "federated, as reported": (lambda: federated_card(2, reported=2), ()),
    "federated, of two units": (lambda: federated_card(2, reported=1, unit=MIXED_UNIT), ()),
    "quantile": (lambda: one_dataset_card(1.0, unit="case", dataset=None), (LONG,)),
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def page(request) -> tuple[Card, dict[str, bytes]]:
    make, labels = VARIANTS[request.param]
    card = make()
    files = rendered(card, described(*labels))
    assert rendered(Card.model_validate_json(card.content), described(*labels)) == files, "not a function of the card"
    return card, files


class _Text(HTMLParser):
    """Tags, their attributes, and text, as a browser reads them."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


# ---- what it says ------------------------------------------------------------------------------------------------


def test_it_says_the_claim_every_price_and_everything_that_is_not_covered(page):
    card, files = page
    text = _Text(files[PAGE]).text
    prices = [card_words.number(price) for price in card.figures.prices]
    words = [card_words.not_covered_in_words(what) for what in card.not_covered]
    covered = [card_words.covered_in_words(what) for what in card.covers]
    assert not [said for said in (card.claim, card.accountant, *prices, *words, *covered) if said not in text]
    assert f"{card.delta:g}" in text and all(f"{name} {version}" in text for name, version in card.versions.items())
    assert all(f"Site {row.site}" in text for row in card.sites)


def test_every_known_identifier_has_words():
    from nnunet_dp.claim import NO_GUARANTEE_RUNS

    for what in (*NOT_COVERED, DECLARED_WEIGHTS, NO_GUARANTEE_RUNS, *LEFT_TO_SITES):
        assert card_words.not_covered_in_words(what).endswith(".") and "_" not in card_words.not_covered_in_words(what)
    assert all(card_words.rule_in_words(name).endswith(".") for name in RULE_NAMES)
    assert card_words.not_covered_in_words("a_word_of_next_year") == "a word of next year"


@pytest.mark.parametrize(("share", "said"), [(0.3051, "30.6 %"), (0.01, "1 %"), (0.99999, "100 %"), (0.05, "5 %")])
def test_a_rate_is_rounded_upwards(share, said):
    assert card_words.percent(share) == said


def test_names_of_a_user_stand_there_as_text():
    files = rendered(one_dataset_card(public_inputs=list(NASTY)), described(*NASTY))
    read = _Text(files[PAGE])
    assert not [tag for tag, _ in read.tags if tag in ("script", "iframe", "object", "img")]
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert all(" ".join(name.split()) in read.text for name in NASTY)
    readme = files[README].decode()
    assert "<script" not in readme and "[x]" not in readme and "{{" not in readme
    assert "&lt;script&gt;alert(1)&lt;" in readme and "\\[x\\]" in readme and "\\{\\{ 7 \\* 7" in readme


def test_it_names_no_script_and_no_address():
    content = rendered(one_dataset_card(), described())[PAGE].decode()
    assert "default-src 'none'" in content and not re.search(r"https?:|//\w|url\(|@import|<script", content)


def test_the_readme_has_metadata_that_a_hub_reads(page, tmp_path):
    from huggingface_hub import ModelCard

    (tmp_path / README).write_bytes(page[1][README])
    data = ModelCard.load(tmp_path / README).data.to_dict()
    assert set(data) <= {"library_name", "pipeline_tag", "tags", "license", "language"}
    assert data["pipeline_tag"] == "image-segmentation" and "differential-privacy" in data["tags"]


# ---- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The machine's own Chromium; nothing is downloaded."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: on Debian and Ubuntu type apt install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: type pip install playwright")
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--no-first-run", "--disable-dev-shm-usage")  # fmt: skip
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=list(quiet))
        yield opened
        opened.close()


OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(element => {
    const box = element.getBoundingClientRect();
    return !element.closest('thead') && !element.closest('svg') && box.width > 0
        && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(element => element.outerHTML.slice(0, 120))"""
CUT = """() => [...document.querySelectorAll('svg text')].filter(text => {
    const box = text.getBoundingClientRect(), frame = text.closest('svg').getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
        || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
}).map(text => text.textContent)"""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_section_asks_for_nothing_and_complains_of_nothing(browser, page, width, tmp_path):
    card, files = page
    (tmp_path / PAGE).write_bytes(files[PAGE])
    said: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 844})
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((tmp_path / PAGE).as_uri())
    tab.screenshot(path=str(tmp_path / f"page_{width}.png"), full_page=True)
    expected = (SECTIONS | ({"sites"} if card.sites else set())) - (set() if card.figures.course else {"curves"})
    found = {section.get_attribute("id") for section in tab.locator("section").all() if section.is_visible()}
    wide = tab.evaluate("document.documentElement.scrollWidth"), tab.evaluate(OVERFLOWING), tab.evaluate(CUT)
    context.close()
    assert (said, asked) == ([], [(tmp_path / PAGE).as_uri()])
    assert found == expected
    assert wide == (width, [], [])
    assert (tmp_path / f"page_{width}.png").stat().st_size > 10_000


def test_it_prints(browser, page, tmp_path):
    (tmp_path / PAGE).write_bytes(page[1][PAGE])
    tab = browser.new_page()
    tab.goto((tmp_path / PAGE).as_uri())
    tab.pdf(path=str(tmp_path / "page.pdf"), format="A4", print_background=True)
    tab.close()
    pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes()))
    assert 2 <= pages <= 8


def test_sites_that_count_different_things_share_a_card_that_says_so():
    sites = tuple(SiteSummary(name, 3, 1.5, 1e-5, unit) for name, unit in (("north", "patient"), ("south", "case")))
    told = Summary("ff", Mode.dp_fedavg, 3, complete=True, sites=sites, not_covered=NOT_COVERED)
    rows = [_row(number, site, None, ()) for number, site in enumerate(sites, 1)]
    card = Claim(_fields(told, rows), {"all": (0, 3)}).card()
    assert card.unit == MIXED_UNIT and [row.unit for row in card.sites] == ["patient", "case"]
    assert "differs between the sites" in rendered(card, described())[PAGE].decode()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unit": "family"}, "the unit should be the sites'"),
        ({"sampler": "poisson"}, "the sampler should follow the charges"),
        ({"sites": {"unit": "case"}}, "the unit should be the sites' (record)"),
        ({"sites": {"epsilon_total": 0.001}}, "the total of its data is below"),
    ],
)
def test_words_that_a_federations_rows_do_not_bear_out_are_faults(changes, words):
    card = federated_card(2)
    assert not list(miscounted(card))
    content = json.loads(card.content)
    content |= {name: value for name, value in changes.items() if name != "sites"}
    content["sites"][0] |= changes.get("sites", {})
    assert any(words in fault for fault in miscounted(Card.model_validate(content)))


def test_a_guarantee_for_whole_sites_needs_sites():
    level = ClientLevelRow(epsilon=1e-3, delta=1e-12, unit="site", bound=1.0)
    assert any("whole sites" in fault for fault in miscounted(one_dataset_card(client_level=level)))


@pytest.mark.parametrize("missing", [{"epsilon": 0.0}, {"unit": None}, {"delta": None}])
def test_a_site_that_took_part_without_saying_what_it_cost_leaves_nothing_to_claim(missing):
    site = SiteSummary(**({"name": "north", "rounds": 3, "epsilon": 1.5, "delta": 1e-5, "unit": "patient"} | missing))
    with pytest.raises(Refusal, match="without saying what that cost"):
        _row(1, site, None, ())


def test_units_that_no_card_takes_become_records():
    assert unit_of(["eye of a patient"]) == unit_of(["patient", "case"]) == MIXED_UNIT
    assert unit_of(["patient", "patient"]) == "patient"

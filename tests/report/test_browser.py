"""The page's script in a real browser, if one is installed."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from test_page import catalogue

from sae_lightning.report.page import AnalysisPage, render_page
from sae_lightning.report.page_data import pack_catalogues

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]
UNITS, ORIGINAL, COPIES = 300, 4, [5, 6, 7]
WORDS = [" the", " cat", "\n", *(f" word{i}" for i in range(400))]
DRIVER = """
<script>
(async () => {
  const wait = () => new Promise(done => setTimeout(done, 300));
  const all = selector => [...document.querySelectorAll(selector)].map(e => e.textContent);
  const type = async text => {
    const search = document.querySelector("[type=search]");
    search.value = text;
    search.dispatchEvent(new Event("input"));
    await wait();
    return all(".row .id");
  };
  while (!document.querySelector(".examples .words")) await wait();
  const seen = { heading: all(".unit header")[0], sections: all(".examples h3"), ids: all(".row .id"),
                 copies: all(".row.copy .id"), picture: all(".unit svg text"), text: [] };
  for (const _ of "abc") {
    seen.text.push(document.querySelector(".examples .words").textContent);
    document.querySelector(".examples li").click();
  }
  seen.byId = await type("7");
  seen.byWord = await type('"word197"');
  seen.none = await type("nowhere");
  await type("");
  document.querySelector(".row .alike").click();
  await wait();
  seen.folded = all(".row .id");
  location.hash = "#neurons";
  while (!document.title.startsWith("Neuron")) await wait();
  seen.neurons = all(".row .id").length;
  document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
})();
</script>
"""  # noqa: E501


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What DRIVER reads off a page that was opened at the link of a copy."""
    copy_of = torch.arange(UNITS)
    copy_of[COPIES] = ORIGINAL
    informativeness = torch.linspace(1, 0, UNITS)
    features = catalogue(UNITS, vocabulary=WORDS, n=6)._replace(
        informativeness=informativeness, copy_of=copy_of
    )
    units = [features, catalogue(3, "neuron", WORDS, 6)]
    html = render_page(AnalysisPage("t", {}, [], units), pack_catalogues(units)) + DRIVER
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(html, "utf8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000"]
    command = [
        CHROMIUM,
        *options,
        "--window-size=1400,3000",
        "--dump-dom",
        f"{path.as_uri()}#feature-6",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    return json.loads(re.search('<pre id="seen">(.*)</pre>', dom).group(1))


def test_a_copy_is_found_by_its_link_and_its_id_and_says_what_it_is_like(seen):
    assert "Feature 6" in seen["heading"]
    assert "3 copies457" in seen["heading"]
    assert seen["copies"] == ["5", "6", "7"]
    assert seen["byId"][0] == "7"
    assert seen["none"] == []


def test_a_search_finds_units_of_all_blocks(seen):
    assert "200" in seen["byWord"]  # WORDS[200] is its token set; it is in the second block
    assert len(seen["byWord"]) < UNITS / 10


def test_copies_are_one_entry_which_can_be_opened(seen):
    assert seen["ids"][:9] == ["0", "1", "2", "3", "4+3", "5", "6", "7", "8"]
    assert seen["folded"][:6] == ["0", "1", "2", "3", "4+3", "8"]


def test_examples_are_shown_by_interval_and_a_click_widens_one_and_narrows_it(seen):
    assert seen["sections"] == ["Strongest examples", "80 to 100 % of the maximum6 to 7.5"]
    narrow, wide, again = seen["text"]
    assert narrow == again
    assert narrow.removesuffix("…") in wide
    assert len(wide) > 2 * len(narrow)


def test_the_axes_of_the_histogram_are_named(seen):
    assert "number of tokens; highest bar: 7" in seen["picture"]
    assert "strength (activation of the feature), log scale" in seen["picture"]
    assert seen["neurons"] == 3

"""The page: its data can be read back, no token breaks it, and it loads nothing from elsewhere."""

import base64
import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from sae_lightning.report.catalogue import (
    BEFORE,
    EDGES,
    INTERVALS,
    WINDOW,
    Catalogue,
    Examples,
    LogitEffect,
    RelatedUnits,
    Statistics,
    TokenSetScores,
)
from sae_lightning.report.figures import make_figure, plot_histogram
from sae_lightning.report.page import (
    TEMPLATES,
    AnalysisPage,
    make_sort_value,
    render_page,
    write_page,
)
from sae_lightning.report.page_data import MAX_LEVEL, UNITS_PER_BLOCK, pack_catalogues
from sae_lightning.report.section import ColouredText, ResultTable, Section

WORDS = [" a", "\n", "</script><script>alert(1)</script>", '"', "&amp;", "<!--<script>", "ü"]
BESIDE = "a", "features.parquet"
FIGURE = make_figure("x", "y").add_bar(x=["</script>"], y=[1])
NAN = float("nan")


def text(sequences: int, vocabulary: int) -> torch.Tensor:
    """[sequences, 128] random ids; the common tokens have low ones (Zipf)."""
    random = torch.Generator().manual_seed(0)
    rare = (1 / torch.arange(1.0, vocabulary + 1)).cumsum(0)
    lots = torch.rand(sequences, 128, generator=random) * rare[-1]
    return torch.searchsorted(rare, lots).clamp(max=vocabulary - 1).int()


def examples(units: int, n: int, texts: torch.Tensor, seed: int) -> Examples:
    """Random examples with a tenth of their tokens active; windows begin after token 3."""
    random = torch.Generator().manual_seed(seed)
    shape = units, n, WINDOW
    sequence = torch.randint(len(texts), shape[:2], generator=random)
    position = torch.randint(BEFORE, 128 - WINDOW, shape[:2], generator=random)
    window = position[..., None] + torch.arange(WINDOW) - BEFORE
    tokens = texts[sequence[..., None], window]
    strengths = torch.rand(shape, generator=random) * 7
    strengths[torch.rand(shape, generator=random) > 0.1] = 0
    strengths[:, :, BEFORE] = 7.5
    tokens[:, :, :3], strengths[:, :, :3] = -1, 0
    peak = torch.full((units, n), 7.5)
    return Examples(peak, tokens, strengths.half(), sequence, position.int())


def catalogue(
    units: int, kind: str = "feature", vocabulary: list[str] = WORDS, n: int = 3
) -> Catalogue:
    texts = text(1000, len(vocabulary))
    top, random = examples(units, n, texts, 0), examples(units, INTERVALS * (n // 3), texts, 1)
    ids = torch.arange(units)[:, None] % len(vocabulary) + torch.zeros(units, 2, dtype=torch.int64)
    fired = torch.arange(units) + 1
    histogram = torch.zeros(units, len(EDGES) - 1, dtype=torch.int64)
    histogram[:, 20] = fired
    bare = Catalogue(
        kind=kind,
        vocabulary=vocabulary,
        token_ids=texts.numpy(),
        statistics=Statistics(1000, fired, fired / 7, torch.full((units,), 7.5), histogram),
        top=top,
        random=random,
    )
    if kind == "neuron":
        return bare
    score = torch.linspace(0, 1, units)
    score[0] = NAN
    related = RelatedUnits(
        torch.tensor([[1, -1]]).expand(units, 2), torch.tensor([[-0.25, NAN]] * units)
    )
    return bare._replace(
        token_sets=TokenSetScores(score, ids.int(), fired % 2 == 0),
        neighbours=related,
        partners=related,
        effect=LogitEffect(ids, ids.flip(0), fired.float()),
    )


def unpacked(block: str, layout: list, units: int) -> dict[str, np.ndarray]:
    """Unpack a block to fields [units, width], following the docstring of page_data.py."""
    content = zlib.decompress(base64.b64decode(block))
    fields = {}
    for name, dtype, width in layout:
        size = np.dtype(dtype).itemsize * units * width
        part, content = np.frombuffer(content[:size], "u1"), content[size:]
        by_number = part.reshape(np.dtype(dtype).itemsize, -1).T.copy()
        fields[name] = by_number.view("<" + dtype).reshape(units, width)
    assert not content
    return fields


class Elements(HTMLParser):
    """Parses a page: start tags with attributes, and the text of each script by id."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.scripts, self.text = [], {}, ""
        self.inside = None  # id or index of the script being parsed
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = dict(attrs).get("id", len(self.elements))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.text += data
        else:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def render(*content, **more) -> str:
    page = AnalysisPage(*content, **more)
    return render_page(page, pack_catalogues(page.catalogues) if page.catalogues else None)


@pytest.fixture(scope="module")
def full() -> Elements:
    sections = [
        Section("One", "A claim.", {"number": "1"}, figures={"A figure": FIGURE}, part="Theory"),
        Section("Two", "Another.", table=ResultTable(["what", "n"], [["</td><script>", "2"]])),
        Section("Three", "A third.", texts=[ColouredText("text", WORDS, [0.5] * 7)], part="Theory"),
    ]
    kinds = [catalogue(5), catalogue(3, "neuron")]
    return Elements(render("<b>", {"LLM": "<i>"}, sections, kinds, ["python '<b>'"], [BESIDE[1]]))


def test_every_number_of_a_unit_can_be_read_back():
    units = UNITS_PER_BLOCK + 2
    given = catalogue(units)
    index, blocks = pack_catalogues([given])
    parts = {f"feature-{name}" for name in ("0", "1", "tokens-0", "tokens-1")}
    assert {*blocks} == {"text", "feature", *parts}
    (kind,) = index["kinds"]
    listed = unpacked(blocks["feature"], kind["list_layout"], units)
    assert listed["firing_counts"][:, 0].tolist() == given.statistics.firing_counts.tolist()
    assert np.array_equal(listed["score"][:, 0], given.token_sets.score.numpy(), equal_nan=True)
    words = unpacked(blocks["feature-tokens-1"], kind["token_layout"], 2)
    assert words["previous"][:, 0].tolist() == given.token_sets.previous.tolist()[-2:]
    last = unpacked(blocks["feature-1"], kind["detail_layout"], 2)
    assert np.array_equal(last["histogram"], given.statistics.histogram[UNITS_PER_BLOCK:].numpy())
    assert last["neighbours"].tolist() == [[1, -1]] * 2
    assert last["neighbours_similarity"][:, 0].tolist() == [-25, -25]


def test_tokens_are_numbered_by_how_common_they_are_and_read_back():
    given = catalogue(4)
    index, blocks = pack_catalogues([given])
    (kind,) = index["kinds"]
    words = index["vocabulary"]
    # the most frequent token has the lowest number, which compresses best
    assert words[:2] == ["", " a"]
    details = unpacked(blocks["feature-0"], kind["detail_layout"], 4)
    texts = unpacked(blocks["text"], index["text_layout"], index["sequences"])["tokens"]
    position = details["position"].astype(int)[..., None] + range(3 - BEFORE, WINDOW - BEFORE)
    read = [words[number] for number in texts[details["sequence"][..., None], position].flatten()]
    ids = torch.cat((given.top.tokens, given.random.tokens), 1)[..., 3:].flatten().tolist()
    assert read == [WORDS[i].replace("\n", "↵") for i in ids]
    listed = unpacked(blocks["feature-tokens-0"], kind["token_layout"], 4)
    peaks = [WORDS[i].replace("\n", "↵") for i in given.top.tokens[:, :, BEFORE].flatten()]
    assert [words[number] for number in listed["peaks"].flatten()] == peaks


def test_strengths_are_within_half_a_level_and_never_vanish():
    given = catalogue(4)
    given.top.strengths[0, 0, 5] = 1e-4  # far below a level
    index, blocks = pack_catalogues([given])
    details = unpacked(blocks["feature-0"], index["kinds"][0]["detail_layout"], 4)
    strengths = torch.cat((given.top.strengths, given.random.strengths), 1).float().flatten(1)
    levels = torch.from_numpy(details["levels"].astype(np.float32))
    assert ((levels > 0) == (strengths > 0)).all()
    assert levels[0, 5] == 1
    error = (levels * 7.5 / MAX_LEVEL - strengths).abs()
    error[0, 5] = 0
    assert error.max() <= 7.5 / MAX_LEVEL / 2 + 1e-6
    assert levels.max() == MAX_LEVEL


def test_a_unit_that_never_fires_is_packed_without_a_nan():
    given = catalogue(2)
    silent = torch.zeros(2)
    given = given._replace(
        statistics=given.statistics._replace(firing_counts=silent.long(), maximum=silent),
        top=given.top._replace(peak_strength=torch.zeros(2, 3), strengths=given.top.strengths * 0),
    )
    index, blocks = pack_catalogues([given])
    details = unpacked(blocks["feature-0"], index["kinds"][0]["detail_layout"], 2)
    assert not details["levels"][:, : 3 * WINDOW].any()


def test_ten_thousand_features_fit_into_30_MB():
    vocabulary = [f" word{i}" for i in range(49_152)]
    few = pack_catalogues([catalogue(2 * UNITS_PER_BLOCK, vocabulary=vocabulary, n=12)])
    page_of_none = len(render("t", {}, [Section("a", "b", figures={"c": FIGURE})], [catalogue(1)]))
    texts = len(few.blocks["text"])
    size = texts + (sum(map(len, few.blocks.values())) - texts) / (2 * UNITS_PER_BLOCK) * 10_000
    words = len(json.dumps(vocabulary))
    # neurons are active on every token: all their strengths are random bytes
    neurons = 576 * 22 * WINDOW * 4 / 3
    assert size + words + neurons + page_of_none < 30e6


def test_no_request_can_leave_the_page(full):
    policy = next(a["content"] for tag, a in full.elements if a.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    sources = " ".join(rules.values()).split()
    assert set(sources) == {"'none'", "'unsafe-inline'", "data:", "blob:"}
    before = full.tags().index("meta"), full.tags().index("style"), full.tags().index("script")
    assert before == tuple(sorted(before)), "what comes before the policy is not held to it"
    for tag, attributes in full.elements:
        assert tag not in ("img", "iframe", "object", "embed", "form", "base")
        for name in ("src", "href", "srcset", "action"):
            link = attributes.get(name, "#")
            assert link.startswith("#") or (tag, link) in (("link", "data:,"), BESIDE)
    style = "".join(file.read_text("utf8") for file in TEMPLATES.glob("*.css"))
    assert "url(" not in style
    assert "@import" not in style


def test_tokens_can_hold_anything(full):
    index = json.loads(full.scripts["index"])
    shown = {word.replace("\n", "↵") for word in WORDS}
    assert set(index["vocabulary"]) <= shown | {""}
    # plotly, a figure, the index, the texts, three blocks of each kind, the page's own two
    assert full.tags().count("script") == 1 + 1 + 1 + 1 + 3 + 3 + 2
    for text in ("</script><script>alert(1)</script>", "<!--<script>", "</td><script>", "&amp;"):
        assert text in full.text
    script = "".join(file.read_text("utf8") for file in TEMPLATES.glob("*.js"))
    for sink in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert sink not in script


HOSTILE = "\u202e\u2066\u200b\u2028\ufeff\x07\x1b[2J\x9b1m\x7f\u3164\udc80"


def test_no_character_of_a_name_or_token_is_invisible_or_turns_others_round():
    """Neither in a setting nor in a heading or a cell."""
    text = f"a{HOSTILE}b"
    table, texts = ResultTable([text], [[text]]), [ColouredText(text, [text], [1.0])]
    section = Section(text, text, {text: text}, table, texts, part=text)
    vocabulary = [text, "\u0301", "سلام", *WORDS]
    html = render(text, {text: text}, [section], [catalogue(5, vocabulary=vocabulary)], [text])
    assert all(c.isprintable() or c == "\n" for c in html)
    shown = "a<U+202E><U+2066><U+200B><U+2028><U+FEFF>␇␛[2J<U+009B>1m␡<U+3164><U+DC80>b"
    page = Elements(html)
    assert page.text.count(shown) == 14
    words = json.loads(page.scripts["index"])["vocabulary"]
    assert {shown, "◌\u0301", "سلام"} <= {*words}


def test_tokens_are_isolated_from_their_neighbours():
    table = ResultTable(["feature", "promotes"], [["3", "' שלום' 'سلام'"]])
    texts = [ColouredText("c", [" שלום", "سلام"], [1.0, 0.0])]
    html = render("t", {}, [Section("Lens", "", table=table, texts=texts)])
    assert "<bdi>&#39; שלום&#39;</bdi> <bdi>&#39;سلام&#39;</bdi></td>" in html
    assert "> שלום</bdi><bdi>سلام</bdi></p>" in html


def test_parts_hold_their_sections_and_have_an_entry_each(full):
    links = [a["href"] for tag, a in full.elements if tag == "a" and "href" in a]
    assert links == ["features.parquet", "#features", "#part-theory", "#part-two"]
    ids = [a["id"] for tag, a in full.elements if "id" in a and tag == "section"]
    assert ["#" + name for name in ids] == links[2:]
    assert re.findall("One|Two|Three", full.text) == ["Two", "One", "Three", "Two"]


def test_every_block_that_the_index_names_is_there(full):
    index = json.loads(full.scripts["index"])
    assert [kind["kind"] for kind in index["kinds"]] == ["feature", "neuron"]
    for kind in index["kinds"]:
        unpacked(full.scripts[f"block-{kind['kind']}"], kind["list_layout"], kind["units"])
        unpacked(
            full.scripts[f"block-{kind['kind']}-tokens-0"], kind["token_layout"], kind["units"]
        )
        unpacked(full.scripts[f"block-{kind['kind']}-0"], kind["detail_layout"], kind["units"])


def test_a_page_of_one_task_is_small_and_has_no_navigation():
    html = render("t", {}, [Section("Probes", "So it is.", table=ResultTable(["a"], [["1"]]))])
    assert len(html) < 20_000
    assert "nav" not in Elements(html).tags()
    assert Elements(html).tags().count("script") == 1


def test_colours_can_be_compared_between_the_texts_of_a_section():
    weak = ColouredText("weak", ["a", "\n"], [1.0, 0.0])
    strong, silent = ColouredText("strong", ["b"], [-4.0]), ColouredText("silent", ["c"], [0.0])
    html = render(
        "t", {}, [Section("s", "l", texts=[weak, strong]), Section("s", "l", texts=[silent])]
    )
    figures = re.findall("<figcaption>(.*?)</figcaption>\n<p>(.*?)</p>", html, re.DOTALL)
    assert dict(figures) == {
        "weak": '<bdi class="t" style="--s:0.25" data-tip="1">a</bdi><bdi>↵\n</bdi>',
        "strong": '<bdi class="t minus" style="--s:1.0" data-tip="-4">b</bdi>',
        "silent": "<bdi>c</bdi>",
    }


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        *(("1,234", 1234), ("12.5 %", 12.5), ("−0.3", -0.3), ("1e-3", 0.001), (".5", 0.5)),
        *(("0.91 ± 0.02", 0.91), ("● 3*", 3), ("–", ""), ("nan", ""), ("", "")),
    ],
)
def test_cells_are_sorted_by_their_number(cell, number):
    assert make_sort_value(cell, is_word=False) == number


def test_the_first_column_is_sorted_as_words_unless_it_holds_only_numbers():
    assert make_sort_value("12", is_word=True) == 12
    assert make_sort_value("12 monkeys", is_word=True) == "12 monkeys"
    assert make_sort_value("genre", is_word=True) == "genre"


def test_a_feature_that_is_alone_has_no_neighbours_to_show():
    alone = catalogue(1)
    nobody = RelatedUnits(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0))
    data = pack_catalogues([alone._replace(neighbours=nobody, partners=nobody)])
    layout = data.index["kinds"][0]["detail_layout"]
    assert ("neighbours", "i4", 0) in layout
    assert unpacked(data.blocks["feature-0"], layout, 1)["neighbours"].shape == (1, 0)


def test_values_that_are_equal_are_one_bar_that_can_be_seen():
    norms = 1 + 1e-7 * torch.arange(-5.0, 6)
    (trace,) = plot_histogram(norms, "norm").data
    assert max(trace.y) == len(norms) == sum(trace.y)
    assert abs(trace.x[trace.y.argmax()] - 1) < 1e-6
    assert trace.width > (trace.x[-1] - trace.x[0]) / 20


def test_values_that_are_close_keep_bars_of_their_own():
    (trace,) = plot_histogram(5 + 0.002 * torch.rand(1000), "norm").data
    assert len(set(trace.x)) == len(trace.x) == 60


def test_long_words_in_a_table_may_wrap_and_numbers_may_not():
    table = ResultTable(["feature", "promotes", "n"], [["3", "' fox' " * 8, "1"], ["4", "", "2"]])
    elements = Elements(render("", {}, [Section("Lens", "", table=table)])).elements
    assert [cell.get("class") for tag, cell in elements if tag == "td"] == [
        *("word", "word long", None),
        *("word", "word long", None),
    ]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """large(units) writes a page that counts as too large for one file; returns its path."""
    monkeypatch.setattr("sae_lightning.report.page.MAX_EMBEDDED_BYTES", 1000)

    def write(units: int):
        path = tmp_path / "index.html"
        write_page(path, AnalysisPage("t", {}, [], [catalogue(units), catalogue(3, "neuron")]))
        return path

    return write


def test_blocks_of_a_large_page_are_files_beside_it(large):
    path = large(UNITS_PER_BLOCK + 2)
    html = Elements(path.read_text("utf8"))
    index = json.loads(html.scripts["index"])
    assert not any(str(name).startswith("block-") for name in html.scripts)
    (policy,) = (a["content"] for _, a in html.elements if a.get("http-equiv"))
    assert "script-src 'unsafe-inline' 'self';" in policy, "scripts of its own folder, no others"
    files = {file.name: file.read_text() for file in (path.parent / index["folder"]).iterdir()}
    inside = pack_catalogues([catalogue(UNITS_PER_BLOCK + 2), catalogue(3, "neuron")]).blocks
    assert files == {f"{n}.js": f'blocks.add("{n}", "{inside[n]}");\n' for n in inside}


def test_a_page_that_is_written_again_leaves_no_old_blocks(large, monkeypatch):
    folder = large(2 * UNITS_PER_BLOCK + 1).parent
    (folder / "index-notes").mkdir()
    large(UNITS_PER_BLOCK)
    (beside,) = folder.glob("index-????????????")
    assert len(list(beside.iterdir())) == 7  # three of each kind, and their texts
    large(UNITS_PER_BLOCK)  # the same again
    assert {file.name for file in folder.iterdir()} == {"index.html", "index-notes", beside.name}
    monkeypatch.setattr("sae_lightning.report.page.MAX_EMBEDDED_BYTES", 10**9)
    large(UNITS_PER_BLOCK)
    assert {file.name for file in folder.iterdir()} == {"index.html", "index-notes"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_a_late_unit_of_a_large_page_is_shown_from_disk(large):
    path = large(3 * UNITS_PER_BLOCK)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=8000", f"file://{path}#feature-{3 * UNITS_PER_BLOCK - 2}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert f"<h2>Feature {3 * UNITS_PER_BLOCK - 2}</h2>" in shown
    assert "<rect" in shown, "its histogram is of a block of details"

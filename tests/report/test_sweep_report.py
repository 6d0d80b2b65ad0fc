"""The report of a sweep, from hand-made runs."""

import csv
import io
import json
import math
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from sae_lightning.report.means import MeansTable
from sae_lightning.report.sweep_page import describe_runs, pick_grouping, shorten_value
from sae_lightning.report.sweep_report import CSV, PAGE, write_report
from sae_lightning.report.sweep_table import SweepRun, SweepTable
from sae_lightning.runs import folders
from sae_lightning.terminal import console

NAN = math.nan


def run(folder: Path, *overrides: str, failure: str | None = None, **held_out: float) -> SweepRun:
    """A run of a sweep in `folder`, finished if it has metrics."""
    path = folder / ",".join(overrides).replace("/", "_")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").touch()
    metrics = None
    if held_out:
        metrics = {"tokens": 16384, "held_out": held_out, "training": {"train/dead": 0.125}}
        (path / "metrics.json").write_text(json.dumps(metrics))
    return SweepRun(path, ["trainer=smoke", *overrides], metrics, failure)


def scores(l0: float, ev: float, ce: float | None = None) -> dict[str, float]:
    return {"l0": l0, "explained_variance": ev, "ce_recovered": ev if ce is None else ce}


class Page(HTMLParser):
    """Parses a page: tags, attributes and the text of each table row."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.links, self.rows, self.text = [], [], [], ""
        self.feed(path.read_text("utf8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text += data
        if self.rows and self.rows[-1] and "</tbody>" not in self.tags:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.tags.append(f"</{tag}>")


def test_the_columns_are_what_differs_in_the_order_typed(tmp_path):
    runs = [
        run(tmp_path, f"seed={seed}", "model.features=64", f"loss.l1={l1}")
        for l1 in ("1e-2", "1e-3")
        for seed in (0, 1)
    ]
    assert SweepTable(runs).keys == ["seed", "loss.l1"]


def test_rows_are_in_the_order_of_numbers_then_words(tmp_path):
    values = ("0.01", "null", "9e-4", "10", "2e-3")
    table = SweepTable([run(tmp_path, f"optim.clip={value}") for value in values])
    assert [*table.frame["optim.clip"]] == ["9e-4", "2e-3", "0.01", "10", "null"]
    assert [run.override_values["optim.clip"] for run in table.runs] == [*table.frame["optim.clip"]]


def test_a_sweep_of_one_run_has_a_row_and_no_columns_of_settings(tmp_path):
    table = SweepTable([run(tmp_path, "loss.l1=1", **scores(3, 0.5))])
    assert table.keys == []
    assert table.names == ["loss.l1=1"]
    write_report(tmp_path, table.runs)
    assert "loss.l1=1" in (tmp_path / PAGE).read_text()


def test_the_csv_holds_every_number_to_the_last_digit(tmp_path):
    reason = 'loss became nan, after 12,345 tokens: "optim.lr"=1'
    runs = [
        run(tmp_path, "loss.l1=0.1", l0=1 / 3, explained_variance=NAN, kl=-1e-17),
        run(tmp_path, "loss.l1=0.02", failure=reason),
        run(tmp_path, "loss.l1=0.003"),
    ]
    write_report(tmp_path, runs)
    with open(tmp_path / CSV, newline="") as file:
        unfinished, failed, finished = csv.DictReader(file)
    assert list(finished) == [
        *("loss.l1", "l0", "explained_variance", "kl", "train/dead"),
        *("tokens", "status", "reason", "folder"),
    ]
    assert float(finished["l0"]) == 1 / 3
    assert float(finished["kl"]) == -1e-17
    assert math.isnan(float(finished["explained_variance"]))
    assert (finished["train/dead"], finished["tokens"]) == ("0.125", "16384")
    assert [row["status"] for row in (finished, failed, unfinished)] == [
        *("finished", "failed", "unfinished")
    ]
    assert (failed["reason"], failed["l0"], failed["folder"]) == (reason, "", "loss.l1=0.02")


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t=", "\r=", "＝"])
def test_no_spreadsheet_makes_a_formula_of_a_text_and_numbers_stay_numbers(tmp_path, sign):
    formula = f"{sign}cmd|' /C calc'!A1"
    values = (formula, "-1e-3", "=1", "a\r=1", "b\n=1")
    runs = [SweepRun(tmp_path / formula, [f"x={v}"], None, formula) for v in values]
    runs[1] = runs[1]._replace(metrics={"held_out": {f"{sign}m": -0.5}, "tokens": 3}, failure=None)
    write_report(tmp_path, runs)
    text = (tmp_path / CSV).read_text()
    header, *rows = csv.reader(io.StringIO(text))
    assert len(text.splitlines()) == len(rows) + 1 == 6
    cells = [cell for row in [header, *rows] for cell in row if not number(cell)]
    assert not any(cell.startswith(tuple("=+-@\t\r＝")) for cell in cells)
    numbers = next(row for row in rows if row[0] == "-1e-3")
    assert numbers[1:4] == ["-0.5", "3", "finished"]
    assert {"'=1", "a␍=1", "b↵=1"} < {row[0] for row in rows}


def number(cell: str) -> bool:
    try:
        return not math.isnan(float(cell))
    except ValueError:
        return False


def test_no_name_or_reason_reaches_terminal_or_page_raw(tmp_path, capsys):
    text = "a\x1b[2J\n\u202eb"
    runs = [SweepRun(tmp_path / text, [f"{text}={value}"], None, text) for value in (text, "2")]
    runs[1] = runs[1]._replace(metrics={"held_out": scores(3, 0.5), "tokens": 3}, failure=None)
    write_report(tmp_path, runs)
    shown = "a␛[2J↵<U+202E>b"
    for written in (capsys.readouterr().out, Page(tmp_path / PAGE).text):
        assert all(c.isprintable() or c == "\n" for c in written)
        assert written.count(shown) >= 3


def test_reading_many_runs_shows_how_far_it_is(tmp_path, monkeypatch):
    for number in range(3):
        run(tmp_path, f"seed={number}")
    bars = []

    @contextmanager
    def phase(description: str, total: int | None = None):
        bars.append([description, total, 0])
        yield lambda n: bars.append([description, total, bars.pop()[2] + n])

    monkeypatch.setattr(folders, "phase", phase)
    assert len(folders.read_sweep_runs(tmp_path)) == 3
    assert bars == [["reading runs", 3, 3]]


def test_the_terminal_shows_the_best_the_front_and_why_runs_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = Path("my sweep")
    runs = [
        run(sweep, "loss.l1=0.01", **scores(20, 0.7)),
        run(sweep, "loss.l1=0.001", **scores(90, 0.9)),
        run(sweep, "loss.l1=0.002", **scores(95, 0.8)),
        run(sweep, "loss.l1=7", failure="its loss became nan"),
        run(sweep, "loss.l1=8"),
    ]
    write_report(sweep, runs)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith(" 0.0") or "●" in line]
    assert lines[:3] == [
        ["0.001", "●", "90.0", "0.9000*", "0.9000*", "12.5%*", "finished"],
        ["0.002", "95.0", "0.8000", "0.8000", "12.5%*", "finished"],
        ["0.01", "●", "20.0", "0.7000", "0.7000", "12.5%*", "finished"],
    ]
    assert "failed: loss.l1=7: its loss became nan" in out
    assert "1 of 5 runs did not finish" in out
    assert "tensorboard --logdir 'my sweep'" in out
    assert f"my sweep/{PAGE}" in out


def test_a_narrow_terminal_gets_long_lines_and_whole_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 30)
    write_report(tmp_path, [run(tmp_path, f"loss.l1={i}", **scores(1234.5, 0.5)) for i in (1, 2)])
    out = capsys.readouterr().out
    assert "CE recovered ↑" in out
    assert out.count("1,234.5") == 2
    assert "…" not in out


def test_the_page_needs_nothing_from_elsewhere_and_its_links_lead_somewhere(tmp_path):
    names = ["a b", "'q,r'", "x&y", "100%", "#1", "<b>", "ü"]
    runs = [run(tmp_path, f"data.path={name}", **scores(3, 0.5)) for name in names]
    write_report(tmp_path, [*runs, run(tmp_path, "data.path=?", failure="no such file")])
    page = Page(tmp_path / PAGE)
    assert not {"img", "iframe", "object", "embed"} & set(page.tags)
    links = [link for link in page.links if link != "data:,"]
    assert len(links) == 3 * len(runs) + 2 + 1  # folder and two files each; the failed; the CSV
    for link in links:
        assert link.startswith("./")
        assert (tmp_path / unquote(link)).exists(), link
    style = (tmp_path / PAGE).read_text("utf8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_names_and_reasons_cannot_break_the_page(tmp_path):
    names = ["</script><script>alert(1)</script>", '"&amp;<', "a, b"]
    runs = [run(tmp_path, f"data.path={name}", **scores(3, 0.5)) for name in names]
    write_report(tmp_path, [*runs, run(tmp_path, "data.path=z", failure="</td><script>&")])
    page = Page(tmp_path / PAGE)
    assert page.tags.count("script") == 4, "plotly, two plots, sorting"
    cells = {row[0].strip() for row in page.rows if row}
    assert cells == {*names, "z"}
    assert any("failed: </td><script>&" in cell for row in page.rows for cell in row)


def test_a_sweep_that_failed_altogether_says_so_without_plots(tmp_path):
    write_report(tmp_path, [run(tmp_path, f"optim.lr={lr}", failure="nan") for lr in (1, 2)])
    page = Page(tmp_path / PAGE)
    assert "There is nothing to plot" in page.text
    assert "2 failed" in page.text
    assert page.tags.count("script") == 1, "sorting"
    assert (tmp_path / PAGE).stat().st_size < 20_000


def test_numbers_that_are_none_are_never_the_best_and_are_counted(tmp_path):
    runs = [
        run(tmp_path, "optim.lr=1", **scores(NAN, NAN)),
        run(tmp_path, "optim.lr=2", **scores(4, 0.5, ce=NAN)),
        run(tmp_path, "optim.lr=3", **scores(5, 0.4)),
    ]
    table = MeansTable(SweepTable(runs))
    assert table.best["explained_variance"].sum() == table.best["ce_recovered"].sum() == 1
    assert [*table.front] == [False, True, False]
    write_report(tmp_path, runs)
    assert (
        "2 finished runs without a finite value of each metric are missing"
        in Page(tmp_path / PAGE).text
    )


@pytest.mark.parametrize(
    ("shares", "zero", "best"),
    [
        ((0.9, 0.8, 1.0), (9, 9, 9), (False, False, True)),
        ((1.02, 1.0, 0.99), (9, 9, 9), (True, True, False)),  # above lossless is no better
        ((6.0, 0.8, 0.9), (2.9, 9, 9), (False, False, True)),  # zero ablation helps the LLM
        ((6.0, -3.0, NAN), (2.9, 2.9, 3), (False, False, False)),
    ],
)
def test_ce_recovered_wins_up_to_lossless_and_where_zero_ablation_costs_something(
    tmp_path, shares, zero, best
):
    runs = [
        run(tmp_path, f"layer.index={i}", **scores(9 - i, 0.5, share), ce_zero=ce, ce_clean=3.0)
        for i, (share, ce) in enumerate(zip(shares, zero, strict=True))
    ]
    table = SweepTable(runs)
    assert tuple(MeansTable(table).best["ce_recovered"]) == best
    assert [*table.frame.ce_recovered] == pytest.approx(shares, nan_ok=True), "as it was measured"
    compared = table.comparable_metrics.ce_recovered.dropna()
    assert (compared <= 1).all() and len(compared) == sum(ce > 3 for ce in zero)


def test_copies_are_a_column_and_a_run_of_before_they_were_measured_has_a_dash(tmp_path, capsys):
    near = {"duplicates": 0.0123, "nearest_cosine": 0.456}
    runs = [
        run(tmp_path, "loss.l1=1", **scores(4, 0.5), **near),
        run(tmp_path, "loss.l1=2", **scores(3, 0.4)),
        run(tmp_path, "loss.l1=3", **scores(2, 0.3), **dict.fromkeys(near, NAN)),
    ]
    write_report(tmp_path, runs)
    out = capsys.readouterr().out
    assert "copies ↓" in out and "1.2%*" in out and "0.46 " in out
    page = Page(tmp_path / PAGE)
    (old,) = (row for row in page.rows if row and row[0].strip() == "2")
    assert [cell.strip() for cell in old].count("–") == 2
    assert "copies: 1.2%" in (tmp_path / PAGE).read_text("utf8"), "for the pointer"


def test_the_share_of_the_gap_that_fine_tuning_closed_is_a_column(tmp_path):
    """The SAE added 4.5 - 4 = 0.5 nats to the CE before, and adds 4.3 - 4 = 0.3 after."""
    one, other = (
        run(tmp_path, f"loss.kl={kl}", ce_clean=4.0, ce_spliced=4.3, **scores(32, 0.5))
        for kl in (1, 0)
    )
    one.metrics["before_kl"] = {"ce_clean": 4.0, "ce_spliced": 4.5}
    assert one.final_metrics["ce_gap_closed"] == pytest.approx(0.2 / 0.5)
    assert "ce_gap_closed" not in other.final_metrics
    assert "ce_gap_closed" in SweepTable([one, other]).columns
    one.metrics["before_kl"]["ce_spliced"] = 4.0  # no gap
    assert "ce_gap_closed" not in one.final_metrics


def test_a_failed_run_with_metrics_of_an_earlier_time_is_not_compared(tmp_path):
    runs = [
        run(tmp_path, "optim.lr=1", **scores(4, 0.9), failure="nan"),
        run(tmp_path, "optim.lr=2", **scores(5, 0.4)),
    ]
    table = MeansTable(SweepTable(runs))
    assert [*table.front] == [False, True]
    assert [*table.best["explained_variance"]] == [False, True]


def test_the_heading_says_what_is_common_and_what_differs(tmp_path):
    common = {
        "llm.name": "smollm2",
        "layer.source": "resid",
        "layer.target": None,
        "model.name": "relu",
    }
    common |= {"model.features": 2048, "trainer.tokens": 524288, "data.path": None}
    runs = [
        run(tmp_path, f"layer.index={i}")._replace(settings=common | {"layer.index": i})
        for i in (3, 9)
    ]
    assert describe_runs(runs) == {
        "LLM": "smollm2",
        "site": "resid.3, resid.9",
        "SAE": "relu",
        "features": "2,048",
        "text": "Shakespeare's plays",
        "tokens": "524,288",
    }
    assert describe_runs([run(tmp_path, "layer.index=4")]) == {}


@pytest.mark.parametrize(
    ("swept", "coloured"),
    [
        ({"loss.l1": "1 2 3"}, None),
        ({"loss.l1": "1 2 3", "model.features": "64 128"}, "model.features"),
        ({"loss.l1": "1 2", "model": "relu dense topk"}, "model"),
        ({"loss.l1": "1 2 3 4 5 6 7", "optim.lr": "1 2 3 4 5 6 7"}, None),
    ],
)
def test_colours_stand_for_the_setting_with_few_values_best_for_one_of_words(
    tmp_path, swept, coloured
):
    keys = list(swept)
    grid = [[f"{keys[0]}={value}"] for value in swept[keys[0]].split()]
    for key in keys[1:]:
        grid = [[*row, f"{key}={value}"] for row in grid for value in swept[key].split()]
    assert pick_grouping(MeansTable(SweepTable([run(tmp_path, *row) for row in grid]))) == coloured


def test_long_numbers_are_rounded_in_labels_and_words_are_not():
    values = ["0.0012345678901234", "1234567.25", "1e-4", "standardize", "a_long_name"]
    assert [shorten_value(v) for v in values] == [
        *("0.00123", "1.23e+06", "1e-4", "standardize", "a_long_name")
    ]

"""Sections and units as printed at the terminal."""

from pathlib import Path

import pytest
import torch

from sae_lightning.errors import UserError
from sae_lightning.report.catalogue import (
    BEFORE,
    EDGES,
    WINDOW,
    Catalogue,
    Examples,
    Statistics,
    TokenSetScores,
)
from sae_lightning.report.printer import print_section, print_units
from sae_lightning.report.section import ColouredText, ResultTable, Section
from sae_lightning.runs.cli import report_errors
from sae_lightning.terminal import console, format_command, phase, shorten_path

WORDS = [" the", " cat", "\n", " 世界", "</b>"]


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setattr(console, "width", 100)


def catalogue(peaks: list[int]) -> Catalogue:
    """Two units: one whose examples have these tokens at their peaks, and one that never fires."""
    n = len(peaks)
    tokens = torch.full((2, n, WINDOW), 0, dtype=torch.int32)
    tokens[0, :, BEFORE] = torch.tensor(peaks, dtype=torch.int32)
    tokens[0, -1, : BEFORE - 1] = -1  # the last one is near the beginning of its sequence
    strengths = torch.zeros(2, n, WINDOW)
    strengths[0, :, BEFORE] = 8 - torch.arange(n)
    strengths[0, :, BEFORE + 1] = 4
    sequence = torch.zeros(2, n)
    top = Examples(strengths[:, :, BEFORE], tokens, strengths.half(), sequence, sequence)
    statistics = Statistics(
        tokens=1000,
        firing_counts=torch.tensor([5, 0]),
        mean=torch.tensor([2.0, 0.0]),
        maximum=torch.tensor([8.0, 0.0]),
        histogram=torch.zeros(2, len(EDGES) - 1),
    )
    ids = torch.tensor([[1, 2, -1], [-1, -1, -1]])
    reading = TokenSetScores(torch.tensor([0.75, float("nan")]), ids, torch.tensor([True, False]))
    return Catalogue("feature", WORDS, tokens[0].numpy(), statistics, top, top, reading)


def print_lines(capsys, *arguments, **more) -> list[str]:
    print_units(*arguments, **more)
    return capsys.readouterr().out.splitlines()


def test_a_unit_is_told_with_its_density_maximum_score_and_tokens(capsys):
    heading = print_lines(capsys, catalogue([1]), [0])[1]
    assert heading == (
        "feature 0  fires on 0.5 % of tokens, maximum 8, token score 0.75: after ‘ cat’ ‘↵’"
    )
    assert print_lines(capsys, catalogue([1]), [1]) == ["", "feature 1  never fires"]


def test_how_many_are_like_a_unit_is_told_with_the_one_that_stands_for_them(capsys):
    several = catalogue([1])._replace(copy_of=torch.tensor([0, 0]))
    assert print_lines(capsys, several, [0])[1].endswith(" ‘↵’, and 1 copy")
    assert print_lines(capsys, several, [1])[1] == "feature 1  never fires"
    alone = several._replace(copy_of=torch.tensor([0, 1]))
    assert "cop" not in print_lines(capsys, alone, [0])[1]


def test_neurons_need_no_score(capsys):
    neuron = catalogue([1])._replace(kind="neuron", token_sets=None)
    assert print_lines(capsys, neuron, [0])[1] == "neuron 0  fires on 0.5 % of tokens, maximum 8"


def test_blocks_stand_above_the_letters_of_their_token_and_peaks_below_one_another(capsys):
    lines = print_lines(capsys, catalogue([1, 2, 4]), [0])[2:]
    heights, texts = lines[::2], lines[1::2]
    column = 8 + int((100 - 8) * 0.6)
    assert [text[column : column + 4] for text in texts] == [" cat", "↵ th", "</b>"]
    # 8, 7 and 6 of at most 8 are eighths; the 4 behind is half as high, and spaces carry no block
    assert [line[column:] for line in heights] == [" ███ ▄▄▄", "▇ ▄▄▄", "▆▆▆▆ ▄▄▄"]
    assert not any(line[:column].strip() for line in heights)
    assert [float(text[:8]) for text in texts] == [8, 7, 6]
    assert texts[2][8:column].strip() == "the"
    assert all(len(text) <= 100 for text in texts)


def test_only_as_many_examples_are_shown_as_asked_for(capsys):
    assert len(print_lines(capsys, catalogue([1, 1, 1]), [0], examples=1)) == 2 + 2


def test_wide_letters_keep_blocks_in_place(capsys):
    lines = print_lines(capsys, catalogue([3]), [0])[2:]
    column = 8 + int((100 - 8) * 0.6)
    assert lines[0][column:] == " ████ ▄▄▄"  # two letters of two columns each
    assert lines[1][column:].startswith(" 世界 the")


def test_a_section_is_shown_with_its_numbers_table_and_texts(capsys):
    text = ColouredText("steered", ["A", " cat", "\n", "sat", "[b]"], [0, 4.0, 0, 2.0, -1.0])
    print_section(
        Section(
            "A title",
            "What was found.",
            {"L0": "64"},
            ResultTable(["[concept]", "score"], [["[genre]", "0.5"]]),
            [text],
            {"a figure": {}},
        )
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4] == ["A title", "What was found.", " L0  64"]
    assert " [concept]  score" in lines
    assert " [genre]      0.5" in lines
    at = lines.index("steered")
    assert lines[at + 1 :] == ["  ███", "A cat↵", "▄▄▄", "sat[b]"]


def test_nothing_of_a_stranger_moves_the_cursor_or_turns_a_line_round(capsys):
    text = "a\x1b[2J\n\u202eb\x9b\r\u200b"
    written = "a␛[2J↵<U+202E>b<U+009B>␍<U+200B>"
    print_section(
        Section(
            text,
            text,
            {text: text},
            ResultTable([text], [[text]]),
            [ColouredText(text, [text], [1])],
        )
    )
    with phase(text):
        pass
    console.print(format_command("analyze.py", run=text), shorten_path(Path(text)))
    console.print(f"a name that nobody has looked at: {text}")
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out.count(written) == 11
    assert "looked at: a␛[2J\n<U+202E>b" in out


@pytest.mark.parametrize("multirun", [False, True])
def test_an_error_that_quotes_a_file_is_one_line_without_controls(capsys, monkeypatch, multirun):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    try:
        with report_errors(Path("x\x1b[2Jy"), multirun):
            raise UserError("architecture=a\x1b[2J\n\u202eb: unknown")
    except SystemExit as error:
        message = error.code + "\n"
    else:
        message = capsys.readouterr().err
    job = "x␛[2Jy: " * multirun
    assert message == f"error: {job}architecture=a␛[2J↵<U+202E>b: unknown\n"


def test_letters_from_right_to_left_stay_within_their_token(capsys):
    tokens = [" שלום", "سلام", " ok", "\u0301"]
    print_section(Section("t", "l", texts=[ColouredText("c", tokens, [1.0, 0.0, 0.0, 0.0])]))
    print_section(
        Section("t", "l", table=ResultTable(["feature", "reads"], [["1", "'שלום' 'سلام'"]]))
    )
    out = capsys.readouterr().out
    assert "\u200e שלום\u200e\u200eسلام\u200e ok◌\u0301" in out
    assert "\u200e'שלום'\u200e \u200e'سلام'\u200e" in out
    assert "\n ████\n" in out, "a block above each letter"


def test_long_texts_are_broken_between_tokens(capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 20)
    print_section(
        Section("t", "l", texts=[ColouredText("c", [" twelve", " chars"] * 3, [0.0, 1.0] * 3)])
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("c") + 1 :] == [
        *("        █████", " twelve chars twelve"[:20]),
        *("█████        █████", "chars twelve chars"),
    ]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_table_that_is_too_wide_is_folded_between_tokens_and_loses_nothing(
    monkeypatch, capsys, columns
):
    monkeypatch.setattr(console, "width", columns)
    tokens = [f"' token {n}'" for n in range(10)]
    table = ResultTable(["feature", "promotes", "suppresses"], [["3", " ".join(tokens), tokens[0]]])
    print_section(Section("Lens", "What it says.", table=table))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert all(token in out for token in tokens)
    assert "…" not in out


def test_a_table_that_fits_keeps_its_headings_on_one_line(capsys):
    print_section(
        Section(
            "Probes", "How well.", table=ResultTable(["", "of all units"], [["neurons", "0.5"]])
        )
    )
    assert any(
        line.split() == ["of", "all", "units"] for line in capsys.readouterr().out.split("\n")
    )

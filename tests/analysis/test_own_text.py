"""A text of one's own: each token carries what the SAE makes of it."""

import json
import re
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from planted import FEATURE, save_planted
from tiny_run import write_text

from sae_lightning.analysis import subject as subjects
from sae_lightning.analysis.annotate import MAX_TEXT_TASK_TOKENS, TextTask, annotate, make_sequences
from sae_lightning.analysis.survey import saved_catalogue
from sae_lightning.analysis.survey.saved_catalogue import describe_origin, read_saved_catalogue
from sae_lightning.analysis.survey.survey import survey
from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.report.annotated import AnnotatedText
from sae_lightning.report.page import AnalysisPage, render_page
from sae_lightning.report.page_data import pack_catalogues
from sae_lightning.report.parquet import write_catalogue
from sae_lightning.stream.local import LocalConfig

TEXT = "the quick fox jumps over the lazy dog"


@pytest.fixture
def short(subject):
    """Contexts of 6 tokens: BOS and five of text."""
    subject.config.data.context = 6
    return subject


def encoded(subject, ids: list[int]) -> torch.Tensor:
    """What the SAE encodes [n, features] of one sequence."""
    source = subject.sites.source
    x = capture(subject.llm.model, torch.tensor([ids]), [source])[source][0]
    return subject.sae.encode(x)


def test_a_token_carries_the_features_that_the_sae_encodes_there_the_strongest_first(short):
    found = annotate(short, TEXT)
    ids = short.llm.tokenizer.encode(TEXT)
    windows = [[0, *ids[start : start + 5]] for start in range(0, len(ids), 5)]
    assert len(windows) > 1
    expected = torch.cat([encoded(short, window) for window in windows])
    assert len(found) == len(expected)
    lengths = short.sae.W_dec.norm(dim=1)
    for token, values, number in zip(found, expected, sum(windows, []), strict=True):
        if number == 0:  # BOS
            assert (token.text, token.read, len(token.features)) == ("<bos>", False, 0)
            continue
        assert token.read
        fires = values.nonzero().squeeze(1)
        assert sorted(token.features.tolist()) == fires.tolist()
        torch.testing.assert_close(token.strengths, values[token.features], rtol=1e-4, atol=1e-5)
        written = token.strengths * lengths[token.features]
        assert (written.diff() <= 0).all()
    assert "".join(token.text for token in found if token.read) == TEXT


def test_special_tokens_in_the_text_are_shown_and_not_read(subject):
    found = annotate(subject, "the fox<eos> jumps")
    unread = [token.text for token in found if not token.read]
    assert unread == ["<bos>", "<eos>"]
    assert not any(len(token.features) for token in found if not token.read)
    subject.config.data.keep_special = True
    assert [t.text for t in annotate(subject, "the fox<eos> jumps") if not t.read] == ["<bos>"]


def test_a_norm_that_is_too_large_for_training_is_not_read(subject, words):
    """What is usual, the first batch of the run's own text says: there, no norm is near a tenth of
    the median."""
    subject.corpus = type("Text", (), {"train": words(3000)})
    subject.config.data.max_norm = 0.1
    assert not any(token.read for token in annotate(subject, TEXT))
    subject.config.data.max_norm = 100
    assert all(token.read for token in annotate(subject, TEXT)[1:])


def test_a_text_is_read_in_tokens_as_training_does_whatever_is_in_it(short):
    for text in ("the\n\nfox\tjumps", "füchse 🦊 the", "‮the fox"):
        sequences = make_sequences(short, text)
        ids = short.llm.tokenizer.encode(text, add_special_tokens=False)
        assert sequences.tokens[sequences.is_text].tolist() == ids
        assert annotate(short, text)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    save_planted(folder)
    (folder / "text").mkdir()
    write_text(folder / "text")
    return folder


def task(here: Path, **settings) -> TextTask:
    data = LocalConfig(path=str(here / "text"), held_out=0.34)
    common = {"llm": LLMConfig(name="x"), "data": data, "layer": LayerConfig(index=0)}
    return TextTask(run=str(here / "sae"), task="text", **common, **settings)


def answered(task: TextTask) -> dict:
    """Its numbers, on the catalogue that the first of these tests has made."""
    task.execute(["run", "task", "data"])
    return json.loads((Path(task.run) / "analysis" / "text.json").read_text())


@pytest.mark.slow
def test_the_planted_feature_is_told_in_the_terminal_the_numbers_and_the_page(here, capsys):
    found = answered(task(here, text="a lazy potion", top=1))
    potion = found["tokens"][-1]
    assert (potion["token"], potion["read"], len(potion["features"])) == (" potion", True, 1)
    (wizards,) = (s for s in found["strongest"] if s["feature"] == FEATURE)
    assert wizards["strength"] == pytest.approx(2, rel=1e-3)
    assert wizards["share"] == pytest.approx(1, rel=1e-3)
    assert set(wizards["words"]) == {" wizards", " potion"}
    said = capsys.readouterr().out
    assert re.search(rf" ‘ potion’ +{FEATURE} +2 +100% ", said)
    assert (
        max(map(len, said[said.index("Token by token") : said.index("open in")].splitlines())) <= 80
    )
    page = (here / "sae" / "analysis" / "text.html").read_text()
    own = json.loads(re.search(r'id="annotated">(.*?)</script>', page)[1])
    assert own["tokens"] == ["<bos>", "a", " lazy", " potion"]
    assert FEATURE in own["features"][-1]
    assert own["strengths"][-1][own["features"][-1].index(FEATURE)] == 2
    assert 'class="unread">&lt;bos&gt;</bdi>' in page
    assert 'id="block-feature-0"' in page


@pytest.fixture
def file(subject, words, tmp_path):
    """A catalogue of `subject` as a task leaves it."""
    features = survey(subject, words(600), tokens=300, examples=2).features
    write_catalogue(tmp_path / "features.parquet", features, describe_origin(subject))
    return tmp_path / "features.parquet"


def said_of(subject, file, capsys) -> str:
    """What is printed when the file is not used."""
    assert read_saved_catalogue(subject, file) is None
    return " ".join(capsys.readouterr().out.split())


def test_a_catalogue_of_this_sae_is_used_again_and_told(subject, file, capsys):
    assert read_saved_catalogue(subject, file).num_units == 32
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"features\.parquet, 3\d\d tokens of Shakespeare's plays$", said)


def test_a_catalogue_of_anything_else_is_not_used_in_silence(subject, file, capsys):
    subject.sae.b_enc[0] += 1
    assert said_of(subject, file, capsys).endswith(
        "does not match this SAE in weights: making a new one"
    )
    subject.config.llm.name = "another"
    subject.config.layer.index = 2
    assert "does not match this SAE in LLM and site and weights: making" in said_of(
        subject, file, capsys
    )
    file.write_bytes(file.read_bytes()[:-9])
    assert "features.parquet cannot be used (" in said_of(subject, file, capsys)
    pyarrow.parquet.write_table(pyarrow.table({"feature": [0]}), file)  # of version 0.1.0
    assert "features.parquet cannot be used (" in said_of(subject, file, capsys)
    file.unlink()
    assert said_of(subject, file, capsys).startswith("there is no catalogue of this SAE yet")


OUTSIDE = "a number is not from 0 to "
DAMAGE = [  # column, or number of an example; what the first unit has there; why it is not used
    ("copy_of", 32, f"{OUTSIDE}31"),
    ("neighbours", [0, 1, -1], f"{OUTSIDE}31"),
    ("partners", [0] * 2000, "a list of 2,000"),
    ("partner_likeness", [0.0] * 9, "partners and partner_likeness differ in number"),
    ("maximum", float("nan"), "a number is not finite"),
    ("histogram", [0] * 60, "60 bins"),
    ("linear_histogram", [0] * 60, "60 bins"),
    ("sequence", 2**40, f"{OUTSIDE}134,217,728"),
    ("sequence", 2**26, "67,108,865 sequences of "),
    ("position", 2**31 - 99, f"{OUTSIDE}134,217,728"),
    ("position", -30, f"{OUTSIDE}134,217,728"),
    ("peak", 99, f"{OUTSIDE}20"),
]


def test_a_strangers_catalogue_reaches_neither_other_files_nor_the_memory(subject, file, capsys):
    whole = pyarrow.parquet.read_table(file)
    tables = [
        (whole.rename_columns(["../../x", *whole.column_names[1:]]), "units): making a new one"),
        (whole.drop_columns(["copy_of"]), "it lacks 'copy_of'"),
    ]
    for name, first, why in DAMAGE:
        column = name if name in whole.column_names else "examples"
        values = whole[column].to_pylist()
        values[0] = first if name == column else [values[0][0] | {name: first}]
        place = whole.column_names.index(column)
        tables.append((whole.set_column(place, column, pyarrow.array(values)), why))
    for table, why in tables:
        table = table.replace_schema_metadata(whole.schema.metadata)
        pyarrow.parquet.write_table(table, file)
        said = said_of(subject, file, capsys)
        assert "features.parquet cannot be used (" in said
        assert why in said
        assert said.endswith("): making a new one")


def test_the_columns_of_a_catalogue_of_other_units_are_not_read(subject, file, capsys, monkeypatch):
    """A small file can hold billions of equal rows."""
    whole = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(pyarrow.concat_tables([whole] * 3), file)
    monkeypatch.setattr(pyarrow.parquet, "read_table", lambda _: pytest.fail("read"))
    assert "cannot be used (it describes 96 'feature' units): making" in said_of(
        subject, file, capsys
    )


def test_a_bug_of_ours_is_not_taken_for_a_damaged_catalogue(subject, file, monkeypatch):
    monkeypatch.setattr(saved_catalogue, "describe_origin", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_saved_catalogue(subject, file)


def test_a_catalogue_in_which_nothing_fires_is_read_and_shown(subject, words, tmp_path):
    subject.sae.b_enc[:] = -1e6
    features = survey(subject, words(600), tokens=300, examples=1).features
    write_catalogue(tmp_path / "features.parquet", features, describe_origin(subject))
    back = read_saved_catalogue(subject, tmp_path / "features.parquet")
    assert not back.statistics.firing_counts.any()
    own = AnnotatedText(annotate(subject, TEXT), back)
    assert own.rank_firings() == []
    page = AnalysisPage("t", {}, [], [back], annotated=own)
    assert "jumps" in render_page(page, pack_catalogues([back]))


def test_long_texts_are_cut_at_the_terminal_and_nowhere_else(here, capsys):
    found = answered(task(here, text=TEXT * 50))
    assert len(found["tokens"]) > 400
    said = capsys.readouterr().out
    left = int(re.search(r"(\d+)\s+more\s+tokens\s+are\s+in\s+text\.html", said)[1])
    assert left + 20 == sum(token["read"] for token in found["tokens"])
    assert said.count("\n") < 120


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "text, file: neither of them is given; give one, as text="),
        ({"text": "a", "file": "b"}, "text, file: both of them are given; give one, as text="),
        ({"text": "a", "top": 0}, "top=0: give 1 or more"),
    ],
)
def test_a_bad_setting_is_refused(here, settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        task(here, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": " \n"}, "text: there is no word in it"),
        (
            {"text": "the " * (MAX_TEXT_TASK_TOKENS + 1)},
            r"text: 4,\d\d\d tokens; give at most 4,096",
        ),
        ({"file": b""}, r"file=.*own\.txt: there is no word in it"),
        ({"file": b"\xff\x00"}, r"file=.*own\.txt: is not UTF-8 \(byte 0xff at 0\)"),
        ({"file": b"a" * (2**20 + 1)}, r"file=.*own\.txt: more than 4,096 tokens"),
        ({"file": "missing.txt"}, r"file=missing\.txt: .*No such file"),
        ({"file": "/"}, r"file=/: .*it is not a regular file"),
        ({"file": "/dev/zero"}, r"file=/dev/zero: .*it is not a regular file"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line_before_the_llm_is_loaded(
    here, tmp_path, monkeypatch, settings, message
):
    monkeypatch.setattr(subjects, "load_llm", lambda *_: pytest.fail("the LLM was loaded"))
    if isinstance(settings.get("file"), bytes):
        (tmp_path / "own.txt").write_bytes(settings["file"])
        settings = {"file": str(tmp_path / "own.txt")}
    with pytest.raises(UserError, match=f"^{message}") as found:
        answered(task(here, **settings))
    assert "\n" not in str(found.value)

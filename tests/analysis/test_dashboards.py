"""Dashboards say what the SAE does on the text, in the keys of Neuronpedia and SAEDashboard.

The blocks of the planted LLM add nothing, so that a feature's strength follows from the token
alone: relu(embedding W_enc + b_enc).
"""

import gzip
import json
import shutil
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
from planted import FEATURE, FEATURES, READS, WRITES, save_planted
from subjects import make_subject
from tiny_llm import WIDTH, tiny_tokenizer
from tiny_run import write_begun_run, write_text

from sae_lightning.analysis.dashboards import feature_dashboards
from sae_lightning.analysis.dashboards.contents import DashboardContent, derive_model_id
from sae_lightning.analysis.dashboards.feature_dashboards import list_dashboards
from sae_lightning.analysis.export_task import ExportTask
from sae_lightning.analysis.lens import measure_effects
from sae_lightning.analysis.survey import features_task
from sae_lightning.analysis.survey.survey import survey
from sae_lightning.errors import UserError
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.llm.load import Dtype, LLMConfig, load_llm
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.llm.vocabulary import read_vocabulary
from sae_lightning.stream import open_text
from sae_lightning.stream.local import LocalConfig
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.stream.tokens import open_tokens

SILENT = 7
# What a row of Neuronpedia's database cannot do without, and what shows in a dashboard.
FEATURE_COLUMNS = {
    *("modelId", "layer", "index", "sourceSetName", "creatorId", "createdAt", "maxActApprox"),
    *("hasVector", "vector", "vectorLabel", "vectorDefaultSteerStrength", "hookName"),
    *("topkCosSimIndices", "topkCosSimValues", "frac_nonzero", "decoder_weights_dist"),
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
    *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
    *("neg_str", "neg_values", "pos_str", "pos_values"),
    *("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
}
ACTIVATION_COLUMNS = {
    *("id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue"),
    *("values", "creatorId", "createdAt", "dataSource", "dataIndex", "dfaValues", "dfaMaxValue"),
    *("dfaTargetIndex", "lossValues", "logitContributions", "binMin", "binMax", "binContains"),
    "qualifyingTokenIndex",
}
NEEDED = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId", "releaseName"},
    "source": {"id", "modelId", "setName", "creatorId"},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The planted SAE, in which feature 7 never fires, its LLM, text, and the kept catalogue."""
    folder = tmp_path_factory.mktemp("here")
    save_planted(folder)
    shutil.move(folder / "llm", folder / "gpt2")
    (folder / "text").mkdir()
    write_text(folder / "text")
    _silence(folder / "sae")
    export(folder, folder / "first")
    return folder


def _silence(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "sae_weights.safetensors")
    weights["b_enc"][SILENT] = -1e6
    save_file(weights, folder / "sae_weights.safetensors")


def export(here: Path, to: Path, format: str = "neuronpedia", **settings) -> Path:
    """Run the task; returns the folder that holds the SAE's files."""
    groups = {
        "llm": LLMConfig(name=str(here / "gpt2"), dtype=Dtype.float32, device="cpu"),
        "data": LocalConfig(path=str(here / "text"), context=16, held_out=0.34),
        "layer": LayerConfig(index=0),
    }
    settings = {"direct": True} | settings
    task = ExportTask(
        run=str(here / "sae"), task="export", format=format, to=str(to), **groups, **settings
    )
    task.execute(["run", "task", "format", "to", "llm", "data", *settings])
    return next(to.glob("*/*")) if format == "neuronpedia" else to


def read_rows(home: Path, table: str) -> list[dict]:
    """The rows of a table, over all batches."""
    rows = []
    for file in sorted((home / table).glob("batch-*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf8") as lines:
            rows += map(json.loads, lines)
    return rows


@pytest.fixture(scope="module")
def home(here):
    return next((here / "first").glob("*/*"))


@pytest.fixture(scope="module")
def truth(here):
    """Strengths [tokens, features] on the tokens that the catalogue is of, and by token's text."""
    config = LLMConfig(name=str(here / "gpt2"), dtype=Dtype.float32, device="cpu")
    sae, llm = load_sae(here / "sae"), load_llm(config)
    data = LocalConfig(path=str(here / "text"), context=16, held_out=0.34)
    tokens = open_tokens(open_text(data), llm.tokenizer, context=16, seed=0).train
    read = tokens.next(tokens.window_count)
    ids = read.tokens[read.is_text & (read.tokens > 1)]
    strengths = sae.encode(llm.model.get_input_embeddings().weight.detach())
    strengths[:2] = 0  # BOS and EOS are not read
    return strengths[ids], dict(zip(read_vocabulary(llm), strengths, strict=True))


@pytest.mark.slow
def test_every_row_has_the_columns_of_its_table(home):
    assert home.relative_to(home.parents[1]).parts == ("gpt2-small", "1-res-relu-32")
    for table, needed in NEEDED.items():
        (row,) = map(json.loads, (home / f"{table}.jsonl").read_text().splitlines())
        assert {name for name in needed if row[name] is not None} == needed
    for table, columns in (("features", FEATURE_COLUMNS), ("activations", ACTIVATION_COLUMNS)):
        assert {tuple(sorted(row)) for row in read_rows(home, table)} == {tuple(sorted(columns))}
    assert not (home / "explanations").exists()


def test_the_rows_of_all_tables_name_one_another(home):
    release, model, group, source = (
        json.loads((home / f"{table}.jsonl").read_text()) for table in NEEDED
    )
    assert (model["layers"], model["dimension"], model["instruct"]) == (3, WIDTH, False)
    assert group["releaseName"] == release["name"] == group["name"] == "res-relu-32"
    assert (source["id"], source["setName"]) == (home.name, group["name"])
    assert {model["id"], group["modelId"], source["modelId"]} == {"gpt2-small"}
    features, examples = read_rows(home, "features"), read_rows(home, "activations")
    assert [row["index"] for row in features] == [str(i) for i in range(FEATURES)]
    assert {row["index"] for row in examples} == {str(i) for i in range(FEATURES) if i != SILENT}
    rows = features + examples
    assert {(row["modelId"], row["layer"]) for row in rows} == {("gpt2-small", source["id"])}
    assert len({row["id"] for row in examples}) == len(examples)


def test_the_values_of_an_example_are_the_strengths_on_its_tokens(home, truth):
    _, by_token = truth
    for row in read_rows(home, "activations"):
        expected = torch.stack([by_token[token][int(row["index"])] for token in row["tokens"]])
        assert row["values"] == pytest.approx(expected.tolist(), rel=1e-3)
        peak, values = row["qualifyingTokenIndex"], row["values"]
        assert values[peak] == pytest.approx(expected[peak].item(), rel=1e-4)  # not of half
        assert row["maxValue"] == values[row["maxValueTokenIndex"]] == max(values)
        assert row["minValue"] == min(values) >= 0
        assert "<bos>" not in row["tokens"]


def test_frequencies_maxima_and_histograms_are_those_of_the_text(home, truth):
    strengths, _ = truth
    for unit, row in enumerate(read_rows(home, "features")):
        mine = strengths[:, unit]
        assert row["frac_nonzero"] == pytest.approx((mine > 0).double().mean().item(), rel=1e-4)
        assert row["maxActApprox"] == pytest.approx(mine.max().item(), rel=1e-4)
        heights, centres = (row[f"freq_hist_data_bar_{name}"] for name in ("heights", "values"))
        if unit == SILENT:
            assert heights == centres == []
            continue
        assert len(heights) == len(centres) == 50
        assert sum(heights) == (mine > 0).sum()
        half = mine.max() / 100 * 1.01  # a strength on an edge is counted on either side of it
        for height, centre in zip(heights, centres, strict=True):
            assert height <= ((mine > centre - half) & (mine < centre + half)).sum()


def test_an_example_lies_in_its_interval_and_intervals_say_what_they_contain(home, truth):
    strengths, _ = truth
    seen = Counter()
    for row in read_rows(home, "activations"):
        mine, low, high = strengths[:, int(row["index"])], row["binMin"], row["binMax"]
        peak = row["values"][row["qualifyingTokenIndex"]]
        if low == -1:
            assert row["binContains"] == -1
            assert high == pytest.approx(mine.max().item(), rel=1e-4)
            seen["top"] += 1
            continue
        assert low * 0.9999 <= peak <= high * 1.0001
        assert high - low == pytest.approx(mine.max().item() / 5, rel=1e-3)
        within = ((mine >= low * 0.9999) & (mine <= high * 1.0001)).double().mean().item()
        assert row["binContains"] == pytest.approx(within, rel=1e-3)
        seen["low" if low == 0 else "other"] += 1
    assert min(seen[kind] for kind in ("top", "low", "other")) > 20


def test_the_planted_feature_shows_what_it_reads_and_what_it_writes(home):
    row = read_rows(home, "features")[FEATURE]
    assert (row["pos_str"][0], row["pos_values"][0]) == (WRITES, pytest.approx(3))
    assert row["pos_values"] == sorted(row["pos_values"], reverse=True)
    assert row["neg_values"] == sorted(row["neg_values"])
    assert sum(row["logits_hist_data_bar_heights"]) == len(tiny_tokenizer())
    assert row["logits_hist_data_bar_heights"][-1] == 1
    assert row["neuron_alignment_indices"][0] == 1
    assert (row["neuron_alignment_values"][0], row["neuron_alignment_l1"][0]) == (1, 1)
    assert (row["hasVector"], row["vector"], row["hookName"]) == (False, [], None)
    peaks = [r for r in read_rows(home, "activations") if r["index"] == str(FEATURE)]
    assert {r["tokens"][r["qualifyingTokenIndex"]] for r in peaks} == {*READS}
    assert {r["maxValue"] for r in peaks} == {2}  # an embedding of 3, less a bias of 1


def test_some_features_with_their_vectors_and_nothing_is_read_again(here, tmp_path, monkeypatch):
    monkeypatch.setattr(features_task, "survey", None)  # the kept catalogue is used
    named = {"source_set": "res-me", "suffix": "l0-3", "release": "mine", "creator": "Me"}
    home = export(here, tmp_path / "x", feature=[9, FEATURE], vectors=True, **named)
    assert home.name == "1-res-me__l0-3"
    planted, other = read_rows(home, "features")
    assert (planted["index"], other["index"]) == (str(FEATURE), "9")
    W_dec = load_sae(here / "sae").W_dec
    assert planted["vector"] == W_dec[FEATURE].tolist()
    assert other["vector"] == pytest.approx(W_dec[9].tolist(), rel=1e-4)
    assert (planted["hasVector"], planted["hookName"]) == (True, "blocks.1.hook_resid_post")
    assert planted["vectorDefaultSteerStrength"] == planted["maxActApprox"] == 2
    assert json.loads((home / "release.jsonl").read_text())["creatorName"] == "Me"
    # an import of what is in the database already changes nothing
    again = export(here, tmp_path / "y", feature=[9, FEATURE], **named)
    ids = [[row["id"] for row in read_rows(folder, "activations")] for folder in (home, again)]
    assert ids[0] == ids[1]


def test_a_batch_that_never_fires_has_no_file_of_activations(here, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_dashboards, "FEATURES_PER_FILE", 1)
    home = export(here, tmp_path / "x", feature=[FEATURE, SILENT])
    assert [file.name for file in sorted((home / "activations").iterdir())] == ["batch-0.jsonl.gz"]
    assert [row["maxActApprox"] for row in read_rows(home, "features")] == [2, 0]


def test_explanations_come_along_and_a_damaged_file_is_left_out(here, tmp_path, capsys):
    file = here / "sae" / "analysis" / "explain.json"
    scores = {"detection": {"accuracy": 0.9}, "fuzzing": None}
    texts = {FEATURE: "magic", 5: None, 6: "w" * 600}
    found = [{"feature": unit, "text": text} | scores for unit, text in texts.items()]
    file.write_text(json.dumps({"model": "judge", "explanations": found}))
    rows = read_rows(export(here, tmp_path / "x"), "explanations")
    assert [row["index"] for row in rows] == [str(FEATURE), "6"]
    assert (rows[0]["description"], rows[0]["notes"]) == ("magic", "by judge, detection 0.90")
    assert len(rows[1]["description"]) == 512
    assert (rows[0]["typeName"], rows[0]["explanationModelName"]) == (None, None)
    file.write_text('{"explanations": [3]}')
    assert read_rows(export(here, tmp_path / "y"), "explanations") == []
    file.unlink()
    assert "explain.json cannot be read" in capsys.readouterr().out


def test_saedashboard_has_the_same_in_its_keys(here, home, tmp_path):
    folder = export(here, tmp_path / "x", "saedashboard", feature=[3, 4])
    batch = json.loads((folder / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"]) == ("gpt2-small", 1)
    assert (batch["sae_set"], batch["sae_id_suffix"]) == ("res-relu-32", None)
    rows, examples = read_rows(home, "features")[3:5], read_rows(home, "activations")
    same = FEATURE_COLUMNS & batch["features"][0].keys()
    assert batch["features"][0].keys() - same == {
        *("feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations")
    }
    for feature, row in zip(batch["features"], rows, strict=True):
        assert {key: feature[key] for key in same} == {key: row[key] for key in same}
        mine = [e for e in examples if e["index"] == row["index"]]
        for shown, example in zip(feature["activations"], mine, strict=True):
            assert [*shown.values()] == [
                example[key] for key in ("binMin", "binMax", "binContains", "tokens", "values")
            ] + [example["qualifyingTokenIndex"]]
            assert [*shown][-3:] == ["tokens", "values", "qualifying_token_index"]
    skipped = json.loads((folder / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert skipped == [i for i in range(FEATURES) if i not in (3, 4)]
    settings = json.loads((folder / "run_settings.json").read_text())
    assert settings["sae_path"] == "blocks.1.hook_resid_post"
    # its files are uploaded, so they say no path of this machine
    source = json.loads((home / "source.jsonl").read_text())
    places = [settings["huggingface_dataset_path"], batch["features"][0]["dataset"]]
    assert [*places, source["dataset"]] == ["text"] * 3
    assert (settings["n_quantiles"], settings["top_acts_group_size"]) == (5, 12)
    assert settings["n_prompts_total"] == batch["features"][0]["n_prompts_total"]


def test_the_effects_are_those_of_the_page_unless_the_direct_path_is_asked_for(here, tmp_path):
    kept = pyarrow.parquet.read_table(here / "sae" / "analysis" / "features.parquet").to_pylist()
    for row in read_rows(export(here, tmp_path / "x", direct=False), "features"):
        page = kept[int(row["index"])]
        assert row.keys() == FEATURE_COLUMNS
        assert (row["pos_str"], row["neg_str"]) == (page["promoted"], page["suppressed"])
        assert row["pos_values"] == pytest.approx(page["effect_raised"], rel=1e-4)
        assert row["logits_hist_data_bar_heights"] == page["effect_histogram"]


@pytest.mark.slow
def test_a_catalogue_of_an_older_version_is_made_anew(here, tmp_path, capsys):
    file = here / "sae" / "analysis" / "features.parquet"
    whole = pyarrow.parquet.read_table(file)
    for left_out in (["linear_histogram"], ["effect_raised", "effect_lowered", "effect_histogram"]):
        pyarrow.parquet.write_table(whole.drop_columns(left_out), file)
        export(here, tmp_path / left_out[0], feature=[3])
        assert "older version" in capsys.readouterr().out
        assert pyarrow.parquet.read_table(file).column_names == whole.column_names


def test_circuit_tracer_finds_a_feature_by_its_number(here, home, tmp_path):
    folder = export(here, tmp_path / "x", "circuit_tracer_features")
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    assert index.keys() == {"1"}  # the block of the SAE
    data, offsets = (folder / index["1"]["filename"]).read_bytes(), index["1"]["offsets"]
    assert (len(offsets), offsets[-1]) == (FEATURES + 1, len(data))
    rows, all_examples = read_rows(home, "features"), read_rows(home, "activations")
    for unit, row in enumerate(rows):
        # as the page asks for them: one byte too many, of which it reads as many as it is told
        part = data[offsets[unit] : offsets[unit + 1] + 1]
        entry = json.loads(zlib.decompress(part[4 : 4 + int.from_bytes(part[:4], "little")]))
        w = int(((8 * entry["index"] + 1) ** 0.5 - 1) / 2)  # Cantor's pairing, undone
        assert entry["index"] - (w * w + w) // 2 == unit
        assert w - unit == 1
        assert (entry["top_logits"], entry["bottom_logits"]) == (row["pos_str"], row["neg_str"])
        assert entry["act_max"] == pytest.approx(row["maxActApprox"], rel=1e-4)
        assert entry["activation_frequency"] == row["frac_nonzero"]
        if unit != SILENT:
            assert entry["histogram"] == row["freq_hist_data_bar_heights"]
        shown = [e for group in entry["examples_quantiles"] for e in group["examples"]]
        mine = [e for e in all_examples if e["index"] == str(unit)]
        for example, other in zip(shown, mine, strict=True):
            assert example["tokens"] == other["tokens"]
            assert example["tokens_acts_list"] == other["values"]
            assert example["train_token_ind"] == other["qualifyingTokenIndex"]
        names = [group["quantile_name"] for group in entry["examples_quantiles"]]
        assert len(set(names)) == len(names) <= 6


def test_a_sweep_with_two_saes_of_a_block_has_no_files_of_features(here, tmp_path):
    for l1 in ("1e-3", "1e-2"):
        write_begun_run(tmp_path / "sweep", l1)
    with pytest.raises(UserError, match=r"loss.l1=1e-[23] and loss.l1=1e-[23] both read block 9"):
        _export_exactly(tmp_path, tmp_path / "x", "circuit_tracer_features", run="sweep")


def test_a_transcoder_is_named_as_one_and_an_effect_without_direct_path_is_left_out(tiny, words):
    llm = tiny("llama")
    names = []
    for pair in ((Kind.mlp_in, Kind.mlp), (Kind.mlp_in, None), (Kind.resid, None)):
        subject = make_subject(llm, *pair)
        given = SimpleNamespace(model_id="m", source_set=None, suffix="x", vectors=False)
        catalogue, effect = survey(subject, words(300), tokens=100), measure_effects(subject, None)
        content = DashboardContent(subject, given, catalogue.features, [3, 5], effect)
        names.append(content.name.id)
        (dashboards,) = list_dashboards(content)
        assert [d["feature_index"] for d in dashboards] == [3, 5]
        without_path = subject.sites.target.kind is Kind.mlp_in
        assert (dashboards[0]["pos_str"] == []) == without_path
    assert names == ["1-tc-relu-32__x", "1-mlp-in-relu-32__x", "1-res-relu-32__x"]


@pytest.mark.parametrize(
    ("llm", "name"),
    [
        ("gpt2", "gpt2-small"),
        ("openai-community/gpt2", "gpt2-small"),
        ("google/gemma-3-1b-pt", "gemma-3-1b"),
        ("google/gemma-2-2b-it", "gemma-2-2b-it"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1-8b-it"),
        ("Qwen/Qwen3.5-2B-Base", "qwen3.5-2b-pt"),
        ("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped"),
        ("smollm2", "smollm2-135m"),
        ("/data/My model/", "my-model"),
    ],
)
def test_a_model_has_the_id_that_neuronpedia_gives_it(llm, name):
    assert derive_model_id(llm) == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_set": "../up"}, r"^source_set=\.\./up: give letters, digits and any of \. _ -"),
        ({"source_set": "a__b"}, "^source_set=a__b: __ separates the suffix; give that as suffix="),
        ({"model_id": ""}, "^model_id=: give letters"),
        ({"feature": [99]}, "^feature=99: this SAE has 32 features"),
        ({"tokens": 0}, "^tokens=0: give 1 or more"),
        (
            {"format": "saelens", "tokens": 9},
            "^tokens has no meaning for format=saelens, only for",
        ),
        ({"format": "saedashboard", "creator": "Me"}, "^creator has no meaning for format=saedash"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(here, tmp_path, settings, message):
    settings = {"direct": True} | settings if "format" not in settings else settings
    with pytest.raises(UserError, match=message):
        _export_exactly(here, tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()


def _export_exactly(
    here: Path, to: Path, format: str = "neuronpedia", run: str = "sae", **settings
) -> None:
    groups = {"llm": LLMConfig(name=str(here / "gpt2")), "data": PlaysConfig()}
    task = ExportTask(
        run=str(here / run),
        task="export",
        format=format,
        to=str(to),
        layer=LayerConfig(index=0),
        **groups,
        **settings,
    )
    task.execute(["run", "task", "format", "to", "llm", *settings])

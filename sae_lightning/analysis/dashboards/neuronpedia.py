"""Writes a folder that Neuronpedia's importer reads: rows of its database, a file for each table.

<model>/<layer>-<set>[__suffix]/release.jsonl model.jsonl sourceset.jsonl source.jsonl
                                features/batch-0.jsonl.gz ...
                                activations/batch-0.jsonl.gz ...
                                explanations/batch-0.jsonl.gz ...     if `task=explain` was run

The importer takes a file's columns from its first line, so all lines of a file have the same keys.
It cannot read a file without lines, so no empty file is written.
"""

import gzip
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sae_lightning.analysis.dashboards.contents import DashboardContent
from sae_lightning.analysis.dashboards.feature_dashboards import Dashboard, list_dashboards
from sae_lightning.analysis.subject import Subject
from sae_lightning.terminal import console, shorten_path

Row = dict[str, Any]
"""A row of a table of Neuronpedia's database: column -> value."""
# Columns of a feature's row that have SAEDashboard's key and value.
SAME_KEYS = [
    *(f"neuron_alignment_{column}" for column in ("indices", "values", "l1")),
    *(f"correlated_neurons_{column}" for column in ("indices", "pearson", "l1")),
    *(f"correlated_features_{column}" for column in ("indices", "pearson", "l1")),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "decoder_weights_dist"),
    *("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
]
DESCRIPTION_LENGTH = 512  # characters that Neuronpedia's upload takes of an explanation


def write_neuronpedia(content: DashboardContent, folder: Path) -> None:
    """Write the rows of the SAE, its features, their examples and explanations."""
    name, created = content.name, datetime.now(UTC).isoformat(timespec="milliseconds")
    source_folder = folder / name.model / name.id
    source_folder.mkdir(parents=True)
    for table, row in _describe_source(content, created).items():
        (source_folder / f"{table}.jsonl").write_text(_format_row(row), encoding="utf8")
    explanations = read_explanations(content.subject)
    for i, dashboards in enumerate(list_dashboards(content)):
        features = [d["feature_index"] for d in dashboards]
        tables = {
            "features": [_make_feature(content, d, created) for d in dashboards],
            "activations": [
                _make_activation(content, d, index, created)
                for d in dashboards
                for index in range(len(d["activations"]))
            ],
            "explanations": [
                _make_explanation(content, feature, explanations[feature], created)
                for feature in features
                if feature in explanations
            ],
        }
        for table, rows in tables.items():
            if rows:
                file = source_folder / table / f"batch-{i}.jsonl.gz"
                file.parent.mkdir(exist_ok=True)
                with gzip.open(file, "wt", compresslevel=5, encoding="utf8") as stream:
                    stream.writelines(map(_format_row, rows))


def read_explanations(subject: Subject) -> dict[int, tuple[str, str]]:
    """Read what `task=explain` has saved: feature -> (explanation, a note with its model and
    scores); empty if the file is missing or damaged."""
    path = subject.results_folder / "explain.json"
    if not path.is_file():
        return {}
    try:
        saved = json.loads(path.read_text("utf8"))
        return {
            int(e["feature"]): (str(e["text"]), _describe_scores(str(saved["model"]), e))
            for e in saved.get("explanations", [])
            if e["text"]
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # damaged
        console.print(f"{shorten_path(path)} cannot be read ({error!r}): left out")
        return {}


def _describe_scores(model: str, explanation: dict[str, Any]) -> str:
    """Name the model that wrote an explanation, and its balanced accuracies."""
    note = f"by {model}"
    for test in ("detection", "fuzzing"):
        score = explanation[test]
        if score and score["accuracy"] is not None:
            note += f", {test} {score['accuracy']:.2f}"
    return note


def _format_row(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _make_id(*parts: object) -> str:
    """Make an id of 25 characters that begins with c, as in the database. It is a hash of `parts`,
    so that exporting again gives the same id."""
    return f"c{hashlib.sha256('/'.join(map(str, parts)).encode()).hexdigest()[:24]}"


def _describe_source(content: DashboardContent, created: str) -> dict[str, Row]:
    """Make the rows that describe the SAE's release, LLM, set and the SAE itself, by table."""
    settings, name, subject = content.settings, content.name, content.subject
    prompts, context = content.prompt_shape
    shape = subject.config.data_source.read_shape()
    common = {"visibility": "PUBLIC", "creatorId": settings.creator_id, "createdAt": created}
    release = settings.release or name.source_set
    description = settings.description or subject.heading
    urls = [settings.url] if settings.url else []
    return {
        "release": common
        | {"name": release, "description": description, "descriptionShort": description}
        | {"urls": urls, "creatorName": settings.creator, "creatorNameShort": settings.creator}
        | {"isNewUi": False, "featured": False, "defaultUmapSourceIds": []},
        "model": common
        | {"id": name.model, "displayName": name.model, "displayNameShort": name.model}
        | {"instruct": name.model.endswith("-it"), "layers": shape.layers, "neuronsPerLayer": 0}
        | {"dimension": shape.width, "inferenceEnabled": False, "owner": "", "updatedAt": created},
        "sourceset": common
        | {"modelId": name.model, "name": name.source_set, "releaseName": release}
        | {"description": subject.heading, "type": "", "creatorName": settings.creator}
        | {"urls": urls, "hasDashboards": True, "defaultRange": 1, "defaultShowBreaks": True}
        | dict.fromkeys(("showDfa", "showCorrelated", "showHeadAttribution", "showUmap"), False),
        "source": common
        | {"id": name.id, "modelId": name.model, "setName": name.source_set}
        | {"hasDashboards": True, "inferenceEnabled": False, "inferenceHosts": []}
        | dict.fromkeys(("hasUmap", "hasUmapLogSparsity", "hasUmapClusters"), False)
        | {"num_prompts": prompts, "num_tokens_in_prompt": context}
        | {"dataset": content.dataset, "notes": subject.heading},
    }


def _make_feature(content: DashboardContent, dashboard: Dashboard, created: str) -> Row:
    name, vector = content.name, dashboard["vector"]
    # the strongest example has the maximum over all text
    maximum = max((max(a["values"]) for a in dashboard["activations"]), default=0.0)
    return {
        "modelId": name.model,
        "layer": name.id,
        "index": str(dashboard["feature_index"]),
        "sourceSetName": name.source_set,
        "creatorId": content.settings.creator_id,
        "createdAt": created,
        "maxActApprox": maximum,
        "hasVector": bool(vector),
        "vector": vector,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": maximum if vector else 10.0,  # the database's default
        "hookName": content.subject.sites.target.hook_name if vector else None,
        **_list_neighbours(content, dashboard["feature_index"]),
        **{key: dashboard[key] for key in SAME_KEYS},
    }


def _list_neighbours(content: DashboardContent, feature: int) -> Row:
    """List the features with the most similar decoder rows, and their cosines."""
    others, cosines = (field[feature] for field in content.catalogue.neighbours)
    exists = others >= 0  # padded with -1
    return {
        "topkCosSimIndices": others[exists].tolist(),
        "topkCosSimValues": [round(value, 5) for value in cosines[exists].tolist()],
    }


def _make_activation(
    content: DashboardContent, dashboard: Dashboard, index: int, created: str
) -> Row:
    """Make the database row of the example that has this `index` in the dashboard."""
    name, feature = content.name, dashboard["feature_index"]
    example = dashboard["activations"][index]
    values = example["values"]
    return {
        "id": _make_id("activation", name.model, name.id, feature, index),
        "tokens": example["tokens"],
        "index": str(feature),
        "layer": name.id,
        "modelId": name.model,
        "creatorId": content.settings.creator_id,
        "createdAt": created,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "values": values,
        "dataSource": None,
        "dataIndex": None,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
        "binMin": example["bin_min"],
        "binMax": example["bin_max"],
        "binContains": example["bin_contains"],
        "qualifyingTokenIndex": example["qualifying_token_index"],
    }


def _make_explanation(
    content: DashboardContent, feature: int, explanation: tuple[str, str], created: str
) -> Row:
    """Make the row of an explanation, as `read_explanations` gives it."""
    name, (text, notes) = content.name, explanation
    return {
        "id": _make_id("explanation", name.model, name.id, feature),
        "modelId": name.model,
        "layer": name.id,
        "index": str(feature),
        "description": text[:DESCRIPTION_LENGTH],
        "authorId": content.settings.creator_id,
        "notes": notes,
        # Neuronpedia takes only names that are in its database
        "typeName": None,
        "explanationModelName": None,
        "createdAt": created,
    }

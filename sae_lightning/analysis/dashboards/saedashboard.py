"""Writes SAEDashboard's JSON: batch-0.json, ..., skipped_indexes.json, run_settings.json."""

import json
from pathlib import Path

from sae_lightning.analysis.dashboards.contents import DashboardContent
from sae_lightning.analysis.dashboards.feature_dashboards import FEATURES_PER_FILE, list_dashboards
from sae_lightning.files import write_json
from sae_lightning.report.catalogue import INTERVALS


def write_saedashboard(content: DashboardContent, folder: Path) -> None:
    """Write the files that SAEDashboard's NeuronpediaRunner writes."""
    model, layer, source_set, suffix = content.name
    about = {"model_id": model, "layer": layer, "sae_set": source_set}
    for i, dashboards in enumerate(list_dashboards(content)):
        batch = about | {"sae_id_suffix": suffix, "features": dashboards}
        (folder / f"batch-{i}.json").write_text(json.dumps(batch), encoding="utf8")
    written = {*content.features}
    skipped = [i for i in range(content.subject.features) if i not in written]
    # in this file alone, the layer is a string
    about |= {"layer": str(layer), "log_sparsity": None, "skipped_indexes": skipped}
    write_json(folder / "skipped_indexes.json", about)
    write_json(folder / "run_settings.json", _describe_settings(content))


def _describe_settings(content: DashboardContent) -> dict:
    """Describe how the dashboards were made, in keys of SAEDashboard's NeuronpediaRunnerConfig."""
    model, layer, source_set, suffix = content.name
    prompts, context = content.prompt_shape
    top, random = content.catalogue.top, content.catalogue.random
    return {
        "sae_set": source_set,
        "sae_path": content.subject.sites.source.hook_name,
        "outputs_dir": "",
        "np_set_name": source_set,
        "np_sae_id_suffix": suffix,
        "model_id": model,
        "layer": layer,
        "huggingface_dataset_path": content.dataset,
        "n_prompts_total": prompts,
        "n_tokens_in_prompt": context,
        "n_features_at_a_time": FEATURES_PER_FILE,
        "n_quantiles": INTERVALS,
        "top_acts_group_size": top.peak_strength.shape[1],
        "quantile_group_size": random.peak_strength.shape[1] // INTERVALS,
    }

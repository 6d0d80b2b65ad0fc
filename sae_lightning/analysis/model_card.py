"""The model card of a published SAE: what it was trained on, its scores, and how to open it."""

from collections.abc import Iterator
from typing import Any

import yaml

from sae_lightning.analysis.probing.probes import FEATURES, NEURONS, RANDOM
from sae_lightning.errors import UserError
from sae_lightning.formats.saelens import NOTE_KEY, OWN_KEY
from sae_lightning.formats.trained_on import find_llm_name
from sae_lightning.llm.load import NO_LLM
from sae_lightning.sae import SAE

TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "saelens", "sae_lightning"]
# Setting -> its name in the card's table "What it was trained on".
TRAINING_NAMES = {
    "data.name": "text",
    "data.path": "text",
    "data.concepts": "synthetic concepts",
    "data.context": "tokens in a context",
    "trainer.tokens": "tokens",
    "trainer.batch": "tokens in an update",
    "optim.lr": "learning rate",
    "loss.l1": "L1 coefficient",
    "loss.l0": "L0 coefficient",
    "loss.target_l0": "target L0",
    "model.k": "active features per token",
    "seed": "seed",
}
PREACTIVATION = 'z = x @ w["W_enc"] + w["b_enc"]\n'
# Architecture -> how features are computed from the saved weights w.
FORMULAS = {
    "relu": PREACTIVATION + "features = torch.relu(z)",
    "dense": PREACTIVATION + "features = torch.relu(z)",
    "topk": PREACTIVATION
    + "values, indices = torch.relu(z).topk({k})\n"
    + "features = torch.zeros_like(z).scatter(-1, indices, values)",
    "jumprelu": PREACTIVATION + 'features = torch.relu(z) * (z > w["threshold"])',
    "gated": 'pre = x @ w["W_enc"]\n'
    'z = pre * w["r_mag"].exp() + w["b_mag"]\n'
    'features = torch.relu(z) * (pre + w["b_gate"] > 0)',
}
# after training, these have a fixed threshold
FORMULAS |= dict.fromkeys(("batch_topk", "matryoshka"), FORMULAS["jumprelu"])


def write_card(
    repo: str,
    sae: SAE,
    settings: dict[str, Any],
    results: dict[str, Any],
    licence: str | None,
) -> str:
    """Write the README.md of a repository that holds `sae` in its folder `sae/`: Markdown, with
    the front matter that the hub reads.

    settings: a run's config, empty if it is unknown; results: from `publish_task.read_results`."""
    front_matter = {"library_name": "saelens", "tags": [*TAGS, sae.config.name]}
    if licence:
        front_matter["license"] = licence
    llm = _find_llm(sae)
    if llm and llm.count("/") == 1:  # a name on the hub
        front_matter["base_model"] = llm
    sections = [
        f"# {repo.partition('/')[2]}",
        _describe(sae, llm),
        "## What it was trained on",
        _make_table(["", ""], [*_list_training(sae, settings)]),
        "## How good it is",
        _compare_scores(results),
        "## How to open it",
        f"`x`: activations [tokens, {len(sae.W_enc)}], in float32.",
        *_explain_opening(repo, sae),
    ]
    front_lines = yaml.safe_dump(front_matter, sort_keys=False)
    return f"---\n{front_lines}---\n\n" + "\n\n".join(sections) + "\n"


def _find_llm(sae: SAE) -> str | None:
    """Find the LLM's name on the hub, or the last part of its folder; None if there is no LLM, or
    the metadata do not name it."""
    try:
        name = find_llm_name(sae.metadata, "")
    except UserError:
        return None
    name = name.rpartition("/")[2] if name.startswith("/") else name
    return None if name == NO_LLM else name


def _describe(sae: SAE, llm: str | None) -> str:
    source, target = (sae.metadata.get(key) for key in ("hook_name", "hook_name_out"))
    kind = "transcoder" if target else "sparse autoencoder"
    place = ""
    if source and llm:
        place = f" It reads `{source}` of {llm}"
        place += f" and reconstructs `{target}`." if target else "."
    verb = "trained" if OWN_KEY in sae.metadata else "saved"
    return (
        f"A {kind} with {sae.config.features:,} features ({sae.config.name}), {verb} with "
        f"sae_lightning.{place} It takes activations as they are, without scaling or centring."
    )


def _list_training(sae: SAE, settings: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table "What it was trained on": name, value."""
    yield ["architecture", sae.config.name]
    yield ["features", f"{sae.config.features:,}"]
    flat = {}
    for group, values in settings.items():
        if isinstance(values, dict):
            flat |= {f"{group}.{name}": value for name, value in values.items()}
        else:
            flat[group] = values
    if settings and not {"data.name", "data.path", "data.concepts"} & flat.keys():
        yield ["text", "Shakespeare's plays"]  # the only data with none of these settings
    names = dict(TRAINING_NAMES)
    if flat.get("data.kind") == "activations":
        names["data.path"] = "activations"
    for key, name in names.items():
        value = flat.get(key)
        if isinstance(value, int) and key != "seed":
            yield [name, f"{value:,}"]
        elif value is not None:
            yield [name, str(value)]


def _compare_scores(results: dict[str, Any]) -> str:
    """Make a table of scores from the results of other tasks, each beside a number to compare it
    with."""
    # a saved result may be null: an overview has no probes on most texts
    rows = [*_list_scores(results.get("evaluate") or {})]
    rows += [*_list_random_comparisons(results.get("theory") or {}, results.get("probe") or {})]
    if not rows:
        return "It has not been measured."
    tokens = (results.get("evaluate") or {}).get("tokens")
    amount = f", on {tokens:,} tokens" if tokens else ""
    table = _make_table(["", "this SAE", "for comparison"], rows)
    return f"Measured on data that training never saw{amount}.\n\n{table}"


def _list_scores(scores: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row for each number of the scorecard that was measured: name, value, value to compare
    it with."""

    def show(key: str, form: str, name: str, comparison: str = "") -> Iterator[list[str]]:
        if (value := scores.get(key)) is not None:
            yield [name, format(value, form), comparison]

    yield from show("l0", ".1f", "active features per token (L0)")
    yield from show("explained_variance", ".3f", "explained variance", "the mean: 0")
    keys = {"without the SAE": "ce_clean", "mean": "ce_mean", "zero": "ce_zero"}
    losses = {name: scores[key] for name, key in keys.items() if scores.get(key) is not None}
    comparison = ", ".join(f"{name}: {loss:.3f}" for name, loss in losses.items())
    yield from show("ce_spliced", ".3f", "cross-entropy with the SAE (nats)", comparison)
    yield from show("ce_recovered", ".3f", "cross-entropy recovered", "zero ablation: 0")
    yield from show("unfired", ".1%", "features that never fired")
    yield from show("duplicates", ".1%", "features with a near copy")
    yield from show("recovered", ".1%", "concepts recovered")


def _list_random_comparisons(theory: dict[str, Any], probe: dict[str, Any]) -> Iterator[list[str]]:
    """Yield rows whose comparison is with random directions: how similar decoder rows are, and how
    well a feature predicts labels."""
    overlap = theory.get("overlap") or {}
    if {"decoder", "random"} <= overlap.keys():
        decoder, chance = (f"{overlap[kind]['99%']:.2f}" for kind in ("decoder", "random"))
        yield ["cosine that 99 % of pairs of decoder rows are below", decoder, f"random: {chance}"]
    scores = {s["units"]: s["accuracy"] for s in probe.get("scores", []) if s["k"] == 1}
    if FEATURES in scores:
        others = [f"one of {name}: {scores[name]:.1%}" for name in (NEURONS, RANDOM)]
        others.append(f"the most frequent {probe['label']}: {probe['majority']:.1%}")
        name = f"{probe['label']} predicted from one feature"
        yield [name, f"{scores[FEATURES]:.1%}", ", ".join(others)]


def _make_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _explain_opening(repo: str, sae: SAE) -> Iterator[str]:
    """Yield code that opens the SAE and runs it on `x` [tokens, d_in], in up to three ways."""
    code = f'from sae_lightning import load_sae\n\nsae = load_sae("hub:{repo}")\n'
    yield _make_block("sae_lightning", code + "reconstruction, features = sae(x)")
    if note := sae.metadata.get(NOTE_KEY):  # says how SAELens misreads the SAE
        yield f"{note}."
    else:
        code = f'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo}", "sae")\n'
        last = "features = sae.encode(x)\nreconstruction = sae.decode(features)"
        yield _make_block("SAELens", code + last)
    formula = FORMULAS[sae.config.name].format(k=getattr(sae.config, "k", None))
    skip = ' + x @ w["W_skip"].T' if sae.config.skip else ""
    yield _make_block(
        "PyTorch alone",
        "import torch\nfrom huggingface_hub import hf_hub_download\n"
        "from safetensors.torch import load_file\n\n"
        f'w = load_file(hf_hub_download("{repo}", "sae/sae_weights.safetensors"))\n'
        f'{formula}\nreconstruction = features @ w["W_dec"] + w["b_dec"]{skip}',
    )


def _make_block(title: str, code: str) -> str:
    return f"{title}:\n\n```python\n{code}\n```"

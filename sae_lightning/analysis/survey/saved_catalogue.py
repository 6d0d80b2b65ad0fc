"""Reuses the catalogue that an earlier task has saved, if it is of the same SAE and text."""

import hashlib
from pathlib import Path

from sae_lightning.analysis.subject import Subject
from sae_lightning.llm.vocabulary import read_vocabulary
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.parquet_reader import read_catalogue, read_metadata
from sae_lightning.report.sweep_page import describe_source
from sae_lightning.terminal import console, shorten_path


def describe_origin(subject: Subject) -> dict[str, str]:
    """Describe LLM, site, text and weights (a hash): a catalogue is valid until one changes."""
    weights = hashlib.sha256()
    for name, weight in sorted(subject.sae.weights().items()):
        weights.update(name.encode())
        weights.update(weight.cpu().numpy())
    return describe_source(subject.config.to_flat_dict()) | {"weights": weights.hexdigest()[:16]}


def read_saved_catalogue(subject: Subject, path: Path) -> Catalogue | None:
    """Read the catalogue in the parquet file at `path`; None if missing, unusable or not of
    `subject`. Prints whether the file is used, and if not, why."""
    if not path.is_file():
        console.print("there is no catalogue of this SAE yet: making one")
        return None
    words = read_vocabulary(subject.llm)
    try:
        metadata = read_metadata(path)
        origin = describe_origin(subject).items()
        different = [name for name, value in origin if metadata["of"].get(name) != value]
        if different:
            console.print(
                f"{shorten_path(path)} does not match this SAE in {' and '.join(different)}: "
                "making a new one"
            )
            return None
        catalogue = read_catalogue(path, words)
        # `kind` becomes part of file names: an untrusted file must not choose a path with it
        if (catalogue.kind, catalogue.num_units) != ("feature", subject.features):
            raise ValueError(f"it describes {catalogue.num_units} {catalogue.kind!r} units")
        tokens, text = catalogue.statistics.tokens, metadata["of"]["text"]
        console.print(f"using the catalogue {shorten_path(path)}, {tokens:,} tokens of {text}")
        return catalogue
    except Exception as error:  # damaged, malicious, or from an older version
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        console.print(f"{shorten_path(path)} cannot be used ({why}): making a new one")
        return None

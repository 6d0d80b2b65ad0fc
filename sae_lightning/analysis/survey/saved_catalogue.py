"""Reuses the catalogue that an earlier task has saved, if it is of the same SAE and text."""

import hashlib
from pathlib import Path

from sae_lightning.analysis.subject import Subject
from sae_lightning.llm.vocabulary import read_vocabulary
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.parquet_reader import read_catalogue, read_header
from sae_lightning.report.sweep_page import describe_activations
from sae_lightning.terminal import console, shorten_path


def describe_origin(subject: Subject) -> dict[str, str]:
    """Describe LLM, site, text and weights (a hash): a catalogue is valid until one changes."""
    weights = hashlib.sha256()
    for name, weight in sorted(subject.sae.weights().items()):
        weights.update(name.encode())
        weights.update(weight.cpu().numpy())
    return describe_activations(subject.config.to_flat_dict()) | {
        "weights": weights.hexdigest()[:16]
    }


def read_saved_catalogue(subject: Subject, path: Path) -> Catalogue | None:
    """Read the catalogue in the parquet file at `path`; None if the file is missing or unusable, or
    of another SAE or text than `subject`. Prints whether the file is used, and if not, why."""
    if not path.is_file():
        console.print("there is no catalogue of this SAE yet: making one")
        return None
    try:
        header = read_header(path)
        # Checked before the columns are read, because a small untrusted file may unpack to huge
        # columns. `kind` becomes part of file names, so it must not hold a path.
        if (header.kind, header.units) != ("feature", subject.features):
            raise ValueError(f"it describes {header.units} {header.kind!r} units")
    except Exception as error:  # damaged, malicious, or from an older version
        return _refuse(path, error)
    origin = describe_origin(subject).items()
    different = [name for name, value in origin if header.origin.get(name) != value]
    if different:
        console.print(
            f"{shorten_path(path)} does not match this SAE in {' and '.join(different)}: "
            "making a new one"
        )
        return None
    vocabulary = read_vocabulary(subject.llm)
    try:
        catalogue = read_catalogue(path, vocabulary)
    except Exception as error:
        return _refuse(path, error)
    text = header.origin["text"]
    console.print(f"using the catalogue {shorten_path(path)}, {header.tokens:,} tokens of {text}")
    return catalogue


def _refuse(path: Path, error: Exception) -> None:
    """Print why the file is not used."""
    why = f"it lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
    console.print(f"{shorten_path(path)} cannot be used ({why}): making a new one")

"""Labelled sets of texts for `suite=probing`: those of the package sae-probes (Kantamneni et al.
2025, 2502.16681, table 4), or the user's files in the same format.

The package is never imported, because it imports other tools; only its data files are read.
"""

from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray
from pyarrow import ArrowInvalid, csv

from sae_lightning.errors import UserError

PACKAGE = "sae_probes"
# Sets of different kinds, with texts of at most 120 characters on average.
USUAL_SETS = (
    *("5_hist_fig_ismale", "21_headline_istrump", "36_sciq_tf", "66_living-room"),
    *("87_glue_cola", "92_glue_sst2", "96_spam_is", "105_click_bait", "106_hate_hate"),
    *("114_nyc_borough_Manhattan", "126_art_type_book", "149_twt_emotion_happiness"),
)
MIN_PER_CLASS = 20  # least number of different texts


class LabelledSet(NamedTuple):
    """Texts of two classes, equally many of each, all different."""

    name: str
    texts: list[str]
    labels: ndarray
    """[texts] int64, 0 or 1; the classes take turns."""
    classes: tuple[str, str]
    """What 0 and 1 stand for."""


def find_set_files(folder: str | None) -> dict[str, Path]:
    """Name -> file of every set in `folder`, or in the package sae-probes if `folder` is None.
    UserError: there are no sets, or the package is not installed."""
    if folder is None:
        package = find_spec(PACKAGE)
        if package is None:
            raise UserError(
                "suite=probing: its labelled texts are not installed: "
                "pip install --no-deps sae-probes"
            )
        folder = str(Path(package.submodule_search_locations[0]) / "data" / "cleaned_data")
    files = [file for file in Path(folder).glob("*") if file.name.endswith((".csv", ".csv.zst"))]
    if not files:
        raise UserError(f"sets_folder={folder}: no files *.csv or *.csv.zst in this folder")
    return {file.name.partition(".csv")[0]: file for file in sorted(files, key=_sort_key)}


def read_sets(
    sets: str | list[str], folder: str | None, texts: int, seed: int
) -> list[LabelledSet]:
    """Read at most `texts` texts of each set that the settings `sets` and `sets_folder` choose.

    UserError: a set that is named does not exist, or `_read_set` refuses it. Where all sets are
    read (`all`, or `usual` in a folder), refused sets are left out."""
    set_files = find_set_files(folder)
    if sets == "all" or (sets == "usual" and folder is not None):
        readable = []
        for name, file in set_files.items():
            with suppress(UserError):
                readable.append(_read_set(name, file, texts, seed))
        return readable
    names = [sets] if isinstance(sets, str) else sets
    names = USUAL_SETS if sets == "usual" else names
    check_set_names(names, set_files)
    return [_read_set(name, set_files[name], texts, seed) for name in names]


def check_set_names(names: Iterable[str], existing: Iterable[str]) -> None:
    """UserError, which lists similar names, for the first of `names` that no set has."""
    existing = [*existing]
    for name in names:
        if name not in existing:
            similar = [other for other in existing if name.lower() in other.lower()]
            similar = similar or get_close_matches(name, existing, n=3, cutoff=0.4) or existing
            raise UserError(
                f"sets={name}: no such set; similar names are {', '.join(similar[:5])} "
                f"(of {len(existing)} sets)"
            )


def _read_set(name: str, file: Path, texts: int, seed: int) -> LabelledSet:
    """Read one set. UserError: the file cannot be read, or does not hold two classes with at least
    MIN_PER_CLASS texts each.

    The package's sets repeat texts. Each text is kept once, so that none is in both the training
    and the test part; a text that has both classes is dropped."""
    try:
        table = csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True))
        prompts, targets = (table[column].to_pylist() for column in ("prompt", "target"))
    except (ArrowInvalid, KeyError) as error:
        raise UserError(
            f"sets={name}: {file} is no CSV file with columns prompt and target ({error})"
        ) from error
    class_of: dict[str, Any] = {}  # text -> its class; None if it has several
    for prompt, target in zip(prompts, targets, strict=True):
        if prompt is not None and target is not None:
            text = str(prompt)
            is_new_or_same = text not in class_of or class_of[text] == target
            class_of[text] = target if is_new_or_same else None
    classes = sorted({target for target in class_of.values() if target is not None}, key=str)
    if len(classes) != 2:
        raise UserError(f"sets={name}: {len(classes)} classes; probes are fitted on sets of two")
    rng = np.random.default_rng(seed)
    members = [[text for text, target in class_of.items() if target == c] for c in classes]
    count = min(texts // 2, *map(len, members))  # texts to take of each class
    if count < MIN_PER_CLASS:
        raise UserError(
            f"sets={name}: {count} different texts of a class; {MIN_PER_CLASS} are needed"
        )
    chosen = []  # for each class: a list of `count` texts
    for class_texts in members:
        chosen.append([class_texts[i] for i in rng.permutation(len(class_texts))[:count]])
    return LabelledSet(
        name,
        [text for pair in zip(*chosen, strict=True) for text in pair],  # the classes take turns
        np.tile([0, 1], count),
        (str(classes[0]), str(classes[1])),
    )


def _sort_key(file: Path) -> tuple[int, str]:
    """Sort by the number in front of the file's name (0 without a number), then by name."""
    number = file.name.partition("_")[0]
    return int(number) if number.isdecimal() else 0, file.name

"""Pieces of labelled text, from the packaged plays or any data set with a column of labels."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from sae_lightning.errors import UserError
from sae_lightning.stream.documents import Documents, summarise_cause
from sae_lightning.stream.flat import tokenise_documents
from sae_lightning.stream.packing import Packing
from sae_lightning.stream.plays import find_plays
from sae_lightning.stream.source import DataConfig, DataSource

FOLDS = 4
RIVAL_PLAYS = 4  # plays from which the two main speakers are taken
HEADING = re.compile(r"\*\*([^*\n]+)\*\*\s*")
STAGE_DIRECTION = re.compile(r"_*\\?\[[^\]]*\]_*[ \t]*\n?|_[^_]+_[ \t]*\n?")
NAMES_NOTE = "Names of characters stand in the text and may give a class away."
SPLIT_NOTES = {
    "genre": f"A probe is tested on plays that it was not fitted on. {NAMES_NOTE}",
    "play": f"A probe is tested on a part of each play that it was not fitted on. {NAMES_NOTE}",
    "speaker": (
        "A probe is tested on a part of each role that it was not fitted on. Two of the speakers "
        "are of one play: knowing the play alone gives half of the answers. Headings and "
        "stage directions are removed; names of others stay in the speech."
    ),
}
MAX_DOCUMENTS = 20_000  # documents that are read
MAX_CHARACTERS_PER_TOKEN = 16  # the rest of a document is not tokenised


class Piece(NamedTuple):
    """A piece of text of one class."""

    name: str
    """Its class."""
    fold: int
    """0 to FOLDS - 1: probes are tested on a fold that they never saw."""
    content: Any
    """Its tokens, or a text whose first tokens it will be."""


def cut_plays(
    label: str, tokenizer: Any, packing: Packing, seed: int
) -> tuple[list[Piece], list[str]]:
    """Cut the packaged plays into pieces; also return notes for the reader."""
    if label not in SPLIT_NOTES:
        raise UserError(
            f"label={label}: the packaged plays have {', '.join(SPLIT_NOTES)}; for a column of a "
            "data set add data=text data.path=..., or data=hub data.name=..."
        )
    plays = read_plays()
    texts = find_rivals(plays) if label == "speaker" else {play: plays[play][1] for play in plays}
    names = [genre for genre, _ in plays.values()] if label == "genre" else list(texts)
    folds = deal_folds(names, seed) if label == "genre" else None
    pieces = []
    for i, tokens in enumerate(
        tokenise_documents(tokenizer, list(texts.values()), packing.separator)
    ):
        starts = range(0, len(tokens) - packing.window_size, packing.window_size)
        for place, start in enumerate(starts):
            fold = folds[i] if folds else pick_fold(place, len(starts))
            if fold is not None:
                pieces.append(Piece(names[i], fold, tokens[start : start + packing.window_size]))
    return pieces, [
        SPLIT_NOTES[label],
        "The SAE may have been trained on these plays, without labels.",
    ]


def deal_folds(names: list[str], seed: int) -> list[int]:
    """Assign a fold to each text, given its class: each class is shuffled and dealt in turn."""
    folds, dealt = [0] * len(names), Counter()
    for i in np.random.default_rng(seed).permutation(len(names)):
        folds[i] = dealt[names[i]] % FOLDS
        dealt[names[i]] += 1
    return folds


def pick_fold(place: int, places: int) -> int | None:
    """The fold of a window of a text; None for the gap in front of each fold but the first.

    | 0 . . . |gap| 1 . . . |gap| 2 . . . |gap| 3 . . . |
    """
    fold = place * FOLDS // places
    is_gap = place > 0 and (place - 1) * FOLDS // places < fold
    return None if is_gap else fold


def read_plays() -> dict[str, tuple[str, str]]:
    """Name -> (genre, text) of every packaged play."""
    return {file.stem: (file.parent.name, file.read_text("utf-8")) for file in find_plays()}


def extract_speeches(text: str) -> dict[str, str]:
    """Speaker -> all that they say in a play, without headings and stage directions."""
    speeches: dict[str, list[str]] = {}
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if heading := HEADING.match(paragraph):
            words = STAGE_DIRECTION.sub("", paragraph[heading.end() :]).strip()
            speeches.setdefault(heading[1].strip(), []).append(words)
    return {speaker: "\n\n".join(filter(None, parts)) for speaker, parts in speeches.items()}


def find_rivals(plays: dict[str, tuple[str, str]]) -> dict[str, str]:
    """`SPEAKER (play)` -> all that the two main speakers of a play say, for the RIVAL_PLAYS plays
    in which the second of them says most."""
    pairs = {}
    for play, (_, text) in plays.items():
        ranked = sorted(extract_speeches(text).items(), key=lambda speech: -len(speech[1]))
        if len(ranked) > 1:
            pairs[play] = ranked[:2]
    chosen = sorted(pairs, key=lambda play: -len(pairs[play][1][1]))[:RIVAL_PLAYS]
    return {f"{name} ({play})": words for play in chosen for name, words in pairs[play]}


def cut_documents(source: DataSource, label: str, seed: int) -> tuple[list[Piece], list[str]]:
    """The beginning of each document, as text; also return notes for the reader."""
    documents = source.open_labelled(label)
    try:
        texts = dict(_read_rows(documents, source.data, label, seed))  # each text once
    except UserError:
        raise
    except Exception as error:  # network and file errors come from many libraries
        cause = summarise_cause(error)
        raise UserError(f"{documents.where}: cannot be read ({cause})") from error
    names = list(texts.values())
    pieces = [*map(Piece, names, deal_folds(names, seed), texts)]
    return pieces, [
        "A probe is tested on documents that it was not fitted on; a piece is the first "
        f"{source.data.context - 1} tokens of a document, or all of a shorter one."
    ]


def _read_rows(
    documents: Documents, config: DataConfig, label: str, seed: int
) -> Iterator[tuple[str, str]]:
    """Text and class of at most MAX_DOCUMENTS documents: random ones, or the first of a streamed
    data set."""
    data, columns, where = documents.data, list(documents.first or {}), documents.where
    for setting, column in {"data.column": config.column, "label": label}.items():
        if column not in columns:
            plays = "; the packaged plays have it: data=shakespeare"
            raise UserError(
                f"{setting}={column}: {where} has no such column; it has "
                f"{', '.join(columns) or 'no document'}"
                f"{plays if setting == 'label' and label in SPLIT_NOTES else ''}"
            )
    if label == config.column:
        raise UserError(f"label={label}: that is the column of the text; give one with classes")
    names = getattr((data.features or {}).get(label), "names", None)  # if a ClassLabel
    if hasattr(data, "__len__"):
        order = np.random.default_rng(seed).permutation(len(data))
        data = data.select(np.sort(order[:MAX_DOCUMENTS]))
    for row in islice(data, MAX_DOCUMENTS):
        text, value = row[config.column], row[label]
        if not isinstance(text, str | None):
            raise UserError(
                f"data.column={config.column}: {where} holds {type(text).__name__} there, not text"
            )
        name = _read_class(value, names, f"label={label}: {where}")
        if name and text and text.strip():
            yield text[: MAX_CHARACTERS_PER_TOKEN * config.context], name


def _read_class(value: Any, names: list[str] | None, where: str) -> str | None:
    """The name of a label; None if it is missing."""
    if value is None or value != value:  # NaN: missing in a table
        return None
    if names is not None:
        return names[value] if value >= 0 else None
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # a column of integers with missing values is read as floats
    if not isinstance(value, str | bool | int):
        raise UserError(f"{where} holds {value} there; classes are words or whole numbers")
    return str(value).strip()

"""Cuts labelled text into pieces: the packaged plays, or a data set with a column of labels."""

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
HEADING = re.compile(r"\*\*([^*\n]+)\*\*\s*")  # **HAMLET**, before a speech
STAGE_DIRECTION = re.compile(r"_*\\?\[[^\]]*\]_*[ \t]*\n?|_[^_]+_[ \t]*\n?")  # [Exit] or _Exit_
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
MAX_CHARACTERS_PER_TOKEN = 16  # a document is cut after 16 * `context` characters


class Piece(NamedTuple):
    """A piece of text of one class."""

    class_name: str
    fold: int
    """0 to FOLDS - 1. Probes are tested on a fold that they were not fitted on."""
    tokens: np.ndarray | None
    """Token ids; None for a document that is not tokenised yet."""
    text: str = ""
    """Beginning of a document; empty for a piece of a play."""


def cut_plays(
    label: str, tokenizer: Any, packing: Packing, seed: int
) -> tuple[list[Piece], list[str]]:
    """Cut the packaged plays into pieces of `packing.window_size` tokens; also return notes for the
    reader of the scores. UserError if the plays have no such label."""
    if label not in SPLIT_NOTES:
        raise UserError(
            f"label={label}: the packaged plays have {', '.join(SPLIT_NOTES)}; for a column of a "
            "data set add data=text data.path=..., or data=hub data.name=..."
        )
    plays = read_plays()
    texts = {play: text for play, (_, text) in plays.items()}
    if label == "speaker":
        texts = find_rivals(plays)
    if label == "genre":  # each text is in one fold
        classes = [genre for genre, _ in plays.values()]
        folds = deal_folds(classes, seed)
    else:  # each text is a class, and divided into folds
        classes, folds = list(texts), None
    token_arrays = tokenise_documents(tokenizer, list(texts.values()), packing.separator)
    pieces = []
    for i, tokens in enumerate(token_arrays):
        # whole windows only, without the separator that ends the text
        starts = range(0, len(tokens) - packing.window_size, packing.window_size)
        for window, start in enumerate(starts):
            fold = folds[i] if folds else pick_fold(window, len(starts))
            if fold is not None:
                pieces.append(Piece(classes[i], fold, tokens[start : start + packing.window_size]))
    return pieces, [
        SPLIT_NOTES[label],
        "The SAE may have been trained on these plays, without labels.",
    ]


def deal_folds(classes: list[str], seed: int) -> list[int]:
    """Assign a fold (0 to FOLDS - 1) to each text, given its class: the texts of a class are
    shuffled and dealt to the folds in turn."""
    folds, dealt = [0] * len(classes), Counter()
    for i in np.random.default_rng(seed).permutation(len(classes)):
        folds[i] = dealt[classes[i]] % FOLDS
        dealt[classes[i]] += 1
    return folds


def pick_fold(window: int, windows: int) -> int | None:
    """The fold of a text's window, given its index and the number of windows of the text; None for
    the gap, one window wide, in front of each fold but the first.

    | 0 . . . |gap| 1 . . . |gap| 2 . . . |gap| 3 . . . |
    """
    fold = window * FOLDS // windows
    is_gap = window > 0 and (window - 1) * FOLDS // windows < fold
    return None if is_gap else fold


def read_plays() -> dict[str, tuple[str, str]]:
    """Name -> (genre, text) of every packaged play."""
    return {file.stem: (file.parent.name, file.read_text("utf-8")) for file in find_plays()}


def extract_speeches(text: str) -> dict[str, str]:
    """Speaker -> all that they say in a play, without headings and stage directions."""
    speeches: dict[str, list[str]] = {}
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if heading := HEADING.match(paragraph):
            speech = STAGE_DIRECTION.sub("", paragraph[heading.end() :]).strip()
            speeches.setdefault(heading[1].strip(), []).append(speech)
    return {speaker: "\n\n".join(filter(None, parts)) for speaker, parts in speeches.items()}


def find_rivals(plays: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Pick the two main speakers of RIVAL_PLAYS plays, those in which the second speaker says most
    -> {`SPEAKER (play)`: all that the speaker says}. plays: name -> (genre, text)."""
    pairs, second_lengths = {}, {}
    for play, (_, text) in plays.items():
        by_length = sorted(extract_speeches(text).items(), key=lambda item: -len(item[1]))
        if len(by_length) > 1:
            _, second_speech = by_length[1]
            pairs[play], second_lengths[play] = by_length[:2], len(second_speech)
    chosen = sorted(pairs, key=lambda play: -second_lengths[play])[:RIVAL_PLAYS]
    return {f"{name} ({play})": speech for play in chosen for name, speech in pairs[play]}


def cut_documents(source: DataSource, label: str, seed: int) -> tuple[list[Piece], list[str]]:
    """Make a piece, not tokenised, of the beginning of each document; also return notes for the
    reader of the scores. UserError if no documents with this label can be read."""
    documents = source.open_labelled_documents(label)
    try:
        class_of_text = dict(_read_rows(documents, source.data, label, seed))  # each text once
    except UserError:
        raise
    except Exception as error:  # network and file errors come from many libraries
        cause = summarise_cause(error)
        raise UserError(f"{documents.where}: cannot be read ({cause})") from error
    folds = deal_folds([*class_of_text.values()], seed)
    labelled = zip(class_of_text.items(), folds, strict=True)
    return [Piece(class_name, fold, None, text) for (text, class_name), fold in labelled], [
        "A probe is tested on documents that it was not fitted on; a piece is the first "
        f"{source.data.context - 1} tokens of a document, or all of a shorter one."
    ]


def _read_rows(
    documents: Documents, config: DataConfig, label: str, seed: int
) -> Iterator[tuple[str, str]]:
    """Yield the beginning and the class of at most MAX_DOCUMENTS documents: random ones, or the
    first ones of a streamed data set."""
    data, columns, where = documents.data, list(documents.first_row or {}), documents.where
    for setting, column in {"data.column": config.column, "label": label}.items():
        if column not in columns:
            in_plays = setting == "label" and label in SPLIT_NOTES
            hint = "; the packaged plays have it: data=shakespeare" if in_plays else ""
            raise UserError(
                f"{setting}={column}: {where} has no such column; it has "
                f"{', '.join(columns) or 'no document'}{hint}"
            )
    if label == config.column:
        raise UserError(f"label={label}: that is the column of the text; give one with classes")
    # a ClassLabel holds indices into names
    class_names = getattr((data.features or {}).get(label), "names", None)
    if hasattr(data, "__len__"):  # not streamed
        order = np.random.default_rng(seed).permutation(len(data))
        data = data.select(np.sort(order[:MAX_DOCUMENTS]))
    for row in islice(data, MAX_DOCUMENTS):
        text, value = row[config.column], row[label]
        if not isinstance(text, str | None):
            raise UserError(
                f"data.column={config.column}: {where} holds {type(text).__name__} there, not text"
            )
        class_name = _read_class(value, class_names, f"label={label}: {where}")
        if class_name and text and text.strip():
            yield text[: MAX_CHARACTERS_PER_TOKEN * config.context], class_name


def _read_class(value: Any, class_names: list[str] | None, where: str) -> str | None:
    """The class that the label's column has for a row; None if the class is missing. UserError,
    which begins with `where`, if `value` is neither a word nor a whole number."""
    if value is None or value != value:  # NaN: missing in a table
        return None
    if class_names is not None:
        return class_names[value] if value >= 0 else None  # -1: a missing label
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # a column of integers with missing values is read as floats
    if not isinstance(value, str | bool | int):
        raise UserError(f"{where} holds {value} there; classes are words or whole numbers")
    return str(value).strip()

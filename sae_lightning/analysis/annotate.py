"""`task=text`: which features fire on each token of the user's own text.

    BOS  The  king  is  dead
     -    f    f    f    f        f = the features that fire; the SAE does not read BOS

As in training, the text is cut into sequences of data.context tokens, each opened by BOS.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lightning.analysis.collect import EncodedBatch, collect
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey.features_task import FeaturesTask
from sae_lightning.analysis.task import check_at_least
from sae_lightning.errors import UserError
from sae_lightning.files import read_regular_file
from sae_lightning.llm.vocabulary import check_ids, find_bos_id, find_separator_id, read_vocabulary
from sae_lightning.report.annotated import MAX_LISTED, AnnotatedText, AnnotatedToken, Firing
from sae_lightning.report.printer import print_section
from sae_lightning.report.section import ResultTable, Section, show_token
from sae_lightning.stream.flat import tokenise_documents
from sae_lightning.stream.packing import Packing, Sequences

MAX_TEXT_TASK_TOKENS = 4096
MAX_FILE_BYTES = 1 << 20  # a longer file is refused unread: it has too many tokens
TOKEN_TABLE_LINES = 60  # lines of the table in the terminal
SUMMARY_FEATURES = 10  # features of the whole text listed in the terminal
FEATURE_COLUMNS = ["feature", "strength", "of maximum", "strongest on"]


@dataclass(slots=True, kw_only=True)
class TextTask(FeaturesTask):
    """Which features fire on a text of your own, token by token."""

    text: str | None = None
    """The text itself."""
    file: str | None = None
    """Or a UTF-8 file that holds it."""
    top: int = 3
    """How many features of each token to list: those that add most to its reconstruction."""
    tokens: int = 131_072
    """Tokens to read for the catalogue of features, unless an earlier task has saved a catalogue.
    If tokens, examples or neurons is given, a new catalogue is made."""

    def __post_init__(self):
        FeaturesTask.__post_init__(self)
        check_at_least("top", self.top, 1)
        if (self.text is None) == (self.file is None):
            which = "neither of them is" if self.text is None else "both of them are"
            raise UserError(f"text, file: {which} given; give one, as text='There once was a cat'")

    def execute(self, given_settings: Collection[str]) -> None:
        text = self.text if self.file is None else read_text_file(self.file)
        text_name = "text" if self.file is None else f"file={self.file}"
        subject = self.load_subject(given_settings)
        # before the LLM is loaded, because `make_sequences` may refuse the text
        num_sequences = len(make_sequences(subject, text, text_name).sequence_ids)
        catalogue = self.find_catalogue(subject, given_settings)
        annotated = AnnotatedText(annotate(subject, text, text_name), catalogue)
        ranked = annotated.rank_firings()
        summary = make_text_section(annotated, ranked, num_sequences)
        print_section(make_token_section(annotated, self.top))
        print_section(summary)
        results = {
            "tokens": [
                {
                    "token": token.text,
                    "read": token.read,
                    "active": len(token.features),
                    "features": [
                        make_entry(firing, annotated)
                        for firing in annotated.list_firings(place)[: self.top]
                    ],
                }
                for place, token in enumerate(annotated.tokens)
            ],
            "strongest": [make_entry(firing, annotated) for firing in ranked[:MAX_LISTED]],
        }
        strongest = ranked[0].feature if ranked else None
        self.write_results(subject, results, [summary], [catalogue], strongest, annotated)


def read_text_file(name: str) -> str:
    """Read a UTF-8 file; UserError if it cannot be read or is too long."""
    path = Path(name)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(
                f"file={name}: more than {MAX_TEXT_TASK_TOKENS:,} tokens; give a part of it, or "
                "look at all of it with task=features data=text data.path=..."
            )
        return read_regular_file(path).removeprefix("\ufeff")  # byte order mark
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start:,}"
        raise UserError(f"file={name}: is not UTF-8 ({byte}); give a text file") from error
    except OSError as error:
        raise UserError(
            f"file={name}: cannot be read: {error.strerror}; give a text file"
        ) from error


def make_sequences(subject: Subject, text: str, text_name: str = "text") -> Sequences:
    """Tokenise a text and cut it into sequences as training does. UserError if the text is empty or
    too long, or a token has no row in the LLM's embedding; its message begins with `text_name`."""
    tokenizer, context = subject.tokenizer, subject.config.data.context
    separator = find_separator_id(tokenizer)
    ids = tokenise_documents(tokenizer, [text], separator)[0][:-1]  # without the separator
    if not text.strip() or not len(ids):
        raise UserError(f"{text_name}: there is no word in it; give a text")
    if len(ids) > MAX_TEXT_TASK_TOKENS:
        raise UserError(
            f"{text_name}: {len(ids):,} tokens; give at most {MAX_TEXT_TASK_TOKENS:,} (for more, "
            "use task=features data=text data.path=...)"
        )
    check_ids(tokenizer, ids, text_name)
    context = min(context, 1 + len(ids))  # a short text needs no padding; 1: BOS
    packing = Packing(context, find_bos_id(tokenizer), separator)
    windows = [
        ids[start : start + packing.window_size]
        for start in range(0, len(ids), packing.window_size)
    ]
    return packing.pack_sequences(windows, torch.arange(len(windows)))


@torch.no_grad()
def annotate(subject: Subject, text: str, text_name: str = "text") -> list[AnnotatedToken]:
    """List the tokens of a text, with BOS before each sequence, and the features firing on each.
    UserError as in `make_sequences`."""
    sequences, batch = make_sequences(subject, text, text_name), subject.config.llm.batch
    # split each field, then join the fields of each batch
    fields = [values.split(batch) for values in sequences]
    batches = [Sequences(*parts) for parts in zip(*fields, strict=True)]
    # the run's text comes first: `collect` takes the median norm for max_norm from its first batch
    has_limit = subject.config.data.max_norm is not None
    run_text = [subject.corpus.train.next(batch)] if has_limit else []
    skipped = sum(len(part.sequence_ids) for part in run_text)
    reducer = FeaturesByToken(subject.sae.W_dec.norm(dim=1), skipped)
    total = skipped + len(sequences.sequence_ids)
    collect(subject, chain(run_text, batches), [reducer], total=total, label="reading your text")
    vocabulary, ids = read_vocabulary(subject.llm), sequences.tokens
    is_shown = sequences.is_text.clone()
    is_shown[:, 0] = True  # BOS
    return [
        AnnotatedToken(vocabulary[ids[sequence, i]], *reducer.by_position[sequence, i])
        for sequence, i in is_shown.nonzero().tolist()
    ]


class FeaturesByToken:
    """A reducer: the features that fire on each token, except in the first `skipped` sequences."""

    def __init__(self, decoder_norms: Tensor, skipped: int):
        """decoder_norms [features]: each token's features are sorted by strength * decoder norm."""
        self.decoder_norms, self.skipped = decoder_norms, skipped
        self.by_position: dict[tuple[int, int], tuple[bool, Tensor, Tensor]] = {}
        """(sequence, index in it) -> whether the SAE reads the token, features, their strengths;
        sequences are counted from the first one that is not skipped."""

    def add(self, batch: EncodedBatch) -> None:
        strengths, features = batch.active_features
        norms = self.decoder_norms[features]
        sequences = (batch.sequence_indices - self.skipped).tolist()
        for index, sequence in enumerate(sequences):
            if sequence < 0:
                continue
            for i, values in enumerate(strengths[index]):
                active = values.nonzero().squeeze(1)
                active = active[(values * norms)[active].argsort(descending=True)]
                is_read = bool(batch.keep[index, i])
                active_features = features[active.cpu()], values[active].cpu()
                self.by_position[sequence, i] = is_read, *active_features


def make_entry(firing: Firing, annotated: AnnotatedText) -> dict[str, Any]:
    """Make an entry of `text.json`: a feature that fires, and `words`, the tokens on which it is
    strongest."""
    return firing._asdict() | {"words": annotated.list_peak_tokens(firing.feature)}


def make_token_section(annotated: AnnotatedText, top: int) -> Section:
    """List the `top` features of each token that the SAE reads, for as many tokens as fit into the
    table."""
    rows: list[list[str]] = []
    places = [place for place, token in enumerate(annotated.tokens) if token.read]
    listed = places[: max(1, TOKEN_TABLE_LINES // top)]
    for place in listed:
        name = f"‘{show_token(annotated.tokens[place].text)}’"
        for i, firing in enumerate(annotated.list_firings(place)[:top]):
            rows.append([name if i == 0 else "", *make_cells(firing, annotated)])
        if not len(annotated.tokens[place].features):
            rows.append([name, "none", "", "", ""])
    hidden = len(places) - len(listed)
    more = f" {hidden:,} more tokens are in text.html and text.json." if hidden else ""
    return Section(
        "Token by token",
        "The features that add most to each token's reconstruction. Strengths are activations, "
        "also given as a share of the feature's maximum in the catalogue's text; the last column "
        f"shows tokens on which it is strongest in that text.{more}",
        table=ResultTable(["token", *FEATURE_COLUMNS], rows),
    )


def make_text_section(
    annotated: AnnotatedText, ranked: Sequence[Firing], num_sequences: int
) -> Section:
    """List the features of a whole text that was cut into sequences, in the order of `ranked`."""
    read = sum(token.read for token in annotated.tokens)
    active = sum(len(token.features) for token in annotated.tokens) / max(1, read)
    cut = ""
    if num_sequences > 1:
        cut = f" in {num_sequences} sequences (of data.context, as in training)"
    rows = [
        [*make_cells(firing, annotated), f"‘{show_token(annotated.tokens[firing.place].text)}’"]
        for firing in ranked[:SUMMARY_FEATURES]
    ]
    return Section(
        "Strongest in the whole text",
        f"The SAE reads {read:,} tokens{cut}, with {active:.1f} active features each and "
        f"{len(ranked):,} different ones in all. They are sorted by strength as a share of "
        "their maximum in the catalogue's text; above 100 % is stronger than anywhere there.",
        table=ResultTable([*FEATURE_COLUMNS, "on"], rows),
    )


def make_cells(firing: Firing, annotated: AnnotatedText) -> list[str]:
    """Format a feature as cells of a table row, in the order of FEATURE_COLUMNS."""
    share = "–" if firing.share is None else f"{firing.share:.0%}"
    tokens = " ".join(f"‘{token}’" for token in annotated.list_peak_tokens(firing.feature))
    copies = f" +{firing.copies}" if firing.copies else ""  # copies of it that fire too
    return [str(firing.feature), f"{firing.strength:.3g}", share, tokens + copies]

"""Which features fire on a text of one's own, token by token.

BOS  The  king  is  dead        the text as training reads text: in sequences of data.context
 .    *     *    *    *         tokens, each opened by BOS, which the SAE does not read
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
from sae_lightning.analysis.survey.kept import read_kept_catalogue
from sae_lightning.analysis.task import check_at_least
from sae_lightning.errors import UserError
from sae_lightning.files import read_regular_file
from sae_lightning.llm.vocabulary import check_ids, find_bos_id, find_separator_id, read_vocabulary
from sae_lightning.report.annotated import MAX_LISTED, AnnotatedText, AnnotatedToken, FiredFeature
from sae_lightning.report.printer import print_section
from sae_lightning.report.section import ResultTable, Section, show_token
from sae_lightning.stream.flat import tokenise_documents
from sae_lightning.stream.packing import Packing, Sequences

MAX_TEXT_TASK_TOKENS = 4096  # tokens
MAX_FILE_BYTES = 1 << 20  # bytes of a file that cannot be a text of so few
TOKEN_TABLE_LINES = 60  # of the table at the terminal
SUMMARY_FEATURES = 10  # features of the whole text at the terminal
FEATURE_COLUMNS = ["feature", "strength", "of maximum", "strongest on"]
CATALOGUE_SETTINGS = {"tokens", "examples", "neurons"}  # settings of the catalogue


@dataclass(slots=True, kw_only=True)
class TextTask(FeaturesTask):
    """Which features fire on a text of your own, token by token."""

    text: str | None = None
    """The text."""
    file: str | None = None
    """Or the file that holds it, in UTF-8."""
    top: int = 3
    """Features of each token, the strongest."""
    tokens: int = 131_072
    """Tokens to read for the catalogue of features, if no earlier task has left one. Where this,
    examples or neurons is given, it is made anew."""

    def __post_init__(self):
        FeaturesTask.__post_init__(self)
        check_at_least("top", self.top, 1)
        if (self.text is None) == (self.file is None):
            which = "neither of them is" if self.text is None else "both of them are"
            raise UserError(f"text, file: {which} given; give one, as text='There once was a cat'")

    def execute(self, given: Collection[str]) -> None:
        text = self.text if self.file is None else read_text_file(self.file)
        where = "text" if self.file is None else f"file={self.file}"
        subject = self.load_subject(given)
        # before the LLM is loaded: the text may be refused
        contexts = len(make_sequences(subject, text, where).ids)
        catalogue = None
        if not CATALOGUE_SETTINGS & {*given}:
            catalogue = read_kept_catalogue(subject, subject.results_folder / "features.parquet")
        if catalogue is None:
            catalogue = self.make_catalogues(subject).features
        found = AnnotatedText(annotate(subject, text, where), catalogue)
        strongest = found.rank_fired()
        listed, summary = (
            make_token_section(found, self.top),
            make_text_section(found, strongest, contexts),
        )
        print_section(listed)
        print_section(summary)
        scalars = {
            "tokens": [
                {"token": token.text, "read": token.read, "active": len(token.features)}
                | {
                    "features": [
                        fired_as_json(fired, found) for fired in found.list_fired(place)[: self.top]
                    ]
                }
                for place, token in enumerate(found.tokens)
            ],
            "strongest": [fired_as_json(fired, found) for fired in strongest[:MAX_LISTED]],
        }
        first = strongest[0].feature if strongest else None
        self.publish(subject, scalars, [summary], [catalogue], first, found)


def read_text_file(name: str) -> str:
    """The text in a file; UserError where there is none."""
    path = Path(name)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(
                f"file={name}: more than {MAX_TEXT_TASK_TOKENS:,} tokens; give a part of it, or "
                "look at all of it with task=features data=text data.path=..."
            )
        return read_regular_file(path)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start:,}"
        raise UserError(f"file={name}: is not UTF-8 ({byte}); give a text file") from error
    except OSError as error:
        raise UserError(
            f"file={name}: cannot be read: {error.strerror}; give a text file"
        ) from error


def make_sequences(subject: Subject, text: str, where: str = "text") -> Sequences:
    """The text as training reads it; UserError, which names `where` it comes from, if the LLM
    cannot."""
    tokenizer, context = subject.tokenizer, subject.config.data.context
    separator = find_separator_id(tokenizer)
    ids = tokenise_documents(tokenizer, [text], separator)[0][:-1]
    if not text.strip() or not len(ids):
        raise UserError(f"{where}: there is no word in it; give some")
    if len(ids) > MAX_TEXT_TASK_TOKENS:
        raise UserError(
            f"{where}: {len(ids):,} tokens; give at most {MAX_TEXT_TASK_TOKENS:,} (more text is "
            "for task=features data=text data.path=...)"
        )
    check_ids(tokenizer, ids, where)
    packing = Packing(min(context, 1 + len(ids)), find_bos_id(tokenizer), separator)
    windows = [ids[start : start + packing.width] for start in range(0, len(ids), packing.width)]
    return packing.sequences(windows, torch.arange(len(windows)))


@torch.no_grad()
def annotate(subject: Subject, text: str, where: str = "text") -> list[AnnotatedToken]:
    """The tokens of a text, with BOS before each sequence, and the features that fire on each.

    UserError: the text is empty or too long, or the LLM does not know one of its tokens.
    """
    sequences, batch = make_sequences(subject, text, where), subject.config.llm.batch
    parts = [Sequences(*part) for part in zip(*(x.split(batch) for x in sequences), strict=True)]
    # what norm is usual, the first batch of the run's own text says
    usual = [] if subject.config.data.max_norm is None else [subject.corpus.train.next(batch)]
    firing = FeaturesByToken(subject.sae.W_dec.norm(dim=1), sum(len(part.ids) for part in usual))
    total = firing.skip + len(sequences.ids)
    collect(subject, chain(usual, parts), [firing], total=total, what="reading your text")
    words, ids = read_vocabulary(subject.llm), sequences.tokens
    shown = sequences.text.clone()
    shown[:, 0] = True
    return [
        AnnotatedToken(words[ids[place]], *firing.found[place])
        for place in map(tuple, shown.nonzero().tolist())
    ]


class FeaturesByToken:
    """A reducer: what fires on each token of all sequences but the first `skip`."""

    def __init__(self, lengths: Tensor, skip: int):
        """lengths [features]: of decoder rows; a feature is the stronger the more it writes."""
        self.lengths, self.skip = lengths, skip
        self.found: dict[tuple[int, int], tuple[bool, Tensor, Tensor]] = {}

    def add(self, batch: EncodedBatch) -> None:
        for row, number in enumerate((batch.ids - self.skip).tolist()):
            for place, values in enumerate(batch.features[row] if number >= 0 else ()):
                fires = values.nonzero().squeeze(1)
                fires = fires[(values * self.lengths)[fires].argsort(descending=True)]
                keep = bool(batch.keep[row, place])
                self.found[number, place] = keep, fires.cpu(), values[fires].cpu()


def fired_as_json(fired: FiredFeature, found: AnnotatedText) -> dict[str, Any]:
    """For JSON."""
    return fired._asdict() | {"words": found.list_words(fired.feature)}


def make_token_section(found: AnnotatedText, top: int) -> Section:
    """The `top` features of each token, for the terminal: those of the first tokens."""
    rows: list[list[str]] = []
    read = [place for place, token in enumerate(found.tokens) if token.read]
    shown = read[: max(1, TOKEN_TABLE_LINES // top)]
    for place in shown:
        name = f"‘{show_token(found.tokens[place].text)}’"
        for number, fired in enumerate(found.list_fired(place)[:top]):
            rows.append([name if number == 0 else "", *make_cells(fired, found)])
        if not len(found.tokens[place].features):
            rows.append([name, "none", "", "", ""])
    left = len(read) - len(shown)
    more = f" {left:,} more tokens are in text.html and text.json." if left else ""
    return Section(
        "Token by token",
        "The strongest features on each token: how strong, in the feature's own units and of the "
        f"maximum in the catalogue's text, and some tokens on which it is strongest there.{more}",
        table=ResultTable(["token", *FEATURE_COLUMNS], rows),
    )


def make_text_section(
    found: AnnotatedText, strongest: Sequence[FiredFeature], contexts: int
) -> Section:
    """The `strongest` features of the whole text, which was read in so many `contexts`."""
    read = sum(token.read for token in found.tokens)
    active = sum(len(token.features) for token in found.tokens) / max(1, read)
    cut = f", in {contexts} contexts (data.context) as in training" if contexts > 1 else ""
    rows = [
        [*make_cells(fired, found), f"‘{show_token(found.tokens[fired.place].text)}’"]
        for fired in strongest[:SUMMARY_FEATURES]
    ]
    return Section(
        "Strongest in the whole text",
        f"{read:,} tokens that the SAE reads{cut}, with {active:.1f} active features each, "
        f"{len(strongest):,} different ones. First those that are strongest against their "
        "maximum in the catalogue's text; above 100 % is stronger than anywhere there.",
        table=ResultTable([*FEATURE_COLUMNS, "on"], rows),
    )


def make_cells(fired: FiredFeature, found: AnnotatedText) -> list[str]:
    share = "–" if fired.share is None else f"{fired.share:.0%}"
    words = " ".join(f"‘{word}’" for word in found.list_words(fired.feature))
    more = f" +{fired.copies}" if fired.copies else ""
    return [str(fired.feature), f"{fired.strength:.3g}", share, words + more]

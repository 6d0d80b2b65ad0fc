"""A text, token by token, with the features that fire on each token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lightning.report.catalogue import BEFORE, Catalogue
from sae_lightning.report.section import show_token

MAX_PEAK_TOKENS = 4  # tokens shown with a feature in lists, to identify it
FEW_TOKENS = 20  # features that fire on fewer tokens of the catalogue's text are ranked last
MAX_LISTED = 100  # features in the page's list for the whole text


class AnnotatedToken(NamedTuple):
    """A token and the features that fire on it."""

    text: str
    """Decoded, with its leading space."""
    read: bool
    """False where the SAE is not applied: BOS, other special tokens, norms that are too large."""
    features: Tensor
    """[k] features that fire here, by descending strength * norm of the decoder row, int64"""
    strengths: Tensor
    """[k] strength of each of `features`"""


class Firing(NamedTuple):
    """A feature and a token that it fires on."""

    feature: int
    strength: float
    share: float | None
    """strength / the feature's maximum in the catalogue's text; None if it never fires there."""
    place: int
    """Index of the token in the text."""
    copies: int = 0
    """Number of its copies that fire on the token too."""


class AnnotatedText(NamedTuple):
    """The tokens of a text, and the catalogue that describes the features firing on them."""

    tokens: Sequence[AnnotatedToken]
    catalogue: Catalogue

    def list_firings(self, place: int) -> list[Firing]:
        """Features that fire on the token at index `place`, in the order of its `features`; of
        copies, only the first is listed."""
        token = self.tokens[place]
        by_original: dict[int, Firing] = {}
        maxima = self.catalogue.statistics.maximum[token.features]
        tensors = (token.features, token.strengths, maxima, self.resolve_copies(token.features))
        rows = zip(*[x.tolist() for x in tensors], strict=True)
        for feature, strength, maximum, original in rows:
            if first := by_original.get(original):
                by_original[original] = first._replace(copies=first.copies + 1)
            else:
                share = strength / maximum if maximum else None
                by_original[original] = Firing(feature, strength, share, place)
        return [*by_original.values()]

    def resolve_copies(self, features: Tensor) -> Tensor:
        """The original of each of `features` [n]: the feature itself unless it is a copy."""
        return features if self.catalogue.copy_of is None else self.catalogue.copy_of[features]

    def rank_firings(self) -> list[Firing]:
        """The strongest firing of each feature (copies count as one), sorted by share of the
        feature's maximum. Features that fire on fewer than FEW_TOKENS tokens of the catalogue's
        text come last, because their maximum means little."""
        best: dict[int, Firing] = {}
        originals = self.resolve_copies(torch.arange(self.catalogue.num_units)).tolist()
        for place in range(len(self.tokens)):
            for firing in self.list_firings(place):
                previous = best.get(originals[firing.feature])
                if previous is None or firing.strength > previous.strength:
                    best[originals[firing.feature]] = firing
        is_rare = (self.catalogue.statistics.firing_counts < FEW_TOKENS).tolist()
        return sorted(
            best.values(), key=lambda firing: (is_rare[firing.feature], -(firing.share or 0))
        )

    def list_peak_tokens(self, feature: int) -> list[str]:
        """Texts of up to MAX_PEAK_TOKENS distinct tokens at the peaks of a feature's strongest
        examples in the catalogue."""
        ids = self.catalogue.top.tokens[feature, :, BEFORE].tolist()  # padded with -1
        texts = [show_token(self.catalogue.vocabulary[i]) for i in ids if i >= 0]
        distinct: dict[str, str] = {}
        for text in texts:
            distinct.setdefault(text.strip().lower(), text)
        return [*distinct.values()][:MAX_PEAK_TOKENS]

    def to_page_data(self) -> dict[str, Any]:
        """The JSON that the page's script (templates/text.js) reads."""
        return {
            "tokens": [show_token(token.text) for token in self.tokens],
            "features": [token.features.tolist() for token in self.tokens],
            "strengths": [
                [float(f"{s:.3g}") for s in token.strengths.tolist()] for token in self.tokens
            ],
            "ranked": [
                (firing.feature, firing.strength) for firing in self.rank_firings()[:MAX_LISTED]
            ],
        }

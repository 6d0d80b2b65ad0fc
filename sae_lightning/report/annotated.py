"""A text, token by token, with the features that fire on each token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lightning.report.catalogue import BEFORE, Catalogue
from sae_lightning.report.section import show_token

MAX_WORDS = 4  # shown to identify a feature
FEW_TOKENS = 20  # features that fired on fewer tokens of the catalogue's text are ranked last
MAX_LISTED = 100  # features in the page's list for the whole text


class AnnotatedToken(NamedTuple):
    """A token and the features that fire on it."""

    text: str
    """Decoded, with its leading space."""
    read: bool
    """False where the SAE is not applied: BOS, other special tokens, norms that are too large."""
    features: Tensor
    """[k] features that fire here, by descending strength x norm of the decoder row, int64"""
    strengths: Tensor
    """[k] their activations"""


class FiredFeature(NamedTuple):
    """A feature that fires on a token."""

    feature: int
    strength: float
    """Its activation."""
    share: float | None
    """strength / the feature's maximum in the catalogue's text; None if it never fired there."""
    place: int
    """Index of the token in the text."""
    copies: int = 0
    """Number of its copies that fire there too."""


class AnnotatedText(NamedTuple):
    """The tokens of a text, and the catalogue that describes the features firing on them."""

    tokens: Sequence[AnnotatedToken]
    catalogue: Catalogue

    def list_fired(self, place: int) -> list[FiredFeature]:
        """Features that fire on the token at index `place`, in its order; of features that are
        copies of one another only the first is listed."""
        token = self.tokens[place]
        by_original: dict[int, FiredFeature] = {}
        maxima = self.catalogue.statistics.maximum[token.features]
        values = (token.features, token.strengths, maxima, self.resolve_copies(token.features))
        for feature, strength, maximum, original in zip(*(x.tolist() for x in values), strict=True):
            if listed := by_original.get(original):
                by_original[original] = listed._replace(copies=listed.copies + 1)
            else:
                share = strength / maximum if maximum else None
                by_original[original] = FiredFeature(feature, strength, share, place)
        return [*by_original.values()]

    def resolve_copies(self, features: Tensor) -> Tensor:
        """The original of each feature that is a copy, else the feature itself; same shape as
        `features`."""
        return features if self.catalogue.copy_of is None else self.catalogue.copy_of[features]

    def rank_fired(self) -> list[FiredFeature]:
        """Each feature at its strongest token, sorted by share of its maximum; features that fired
        on fewer than FEW_TOKENS tokens of the catalogue's text come last, because their maximum
        means little."""
        best: dict[int, FiredFeature] = {}
        originals = self.resolve_copies(torch.arange(self.catalogue.num_units)).tolist()
        for place in range(len(self.tokens)):
            for fired in self.list_fired(place):
                previous = best.get(originals[fired.feature])
                if previous is None or fired.strength > previous.strength:
                    best[originals[fired.feature]] = fired
        is_rare = (self.catalogue.statistics.fired < FEW_TOKENS).tolist()
        return sorted(
            best.values(), key=lambda fired: (is_rare[fired.feature], -(fired.share or 0))
        )

    def list_words(self, feature: int) -> list[str]:
        """Up to MAX_WORDS distinct tokens at the peaks of a feature's strongest examples in the
        catalogue."""
        ids = self.catalogue.top.tokens[feature, :, BEFORE].tolist()
        texts = [show_token(self.catalogue.vocabulary[i]) for i in ids if i >= 0]
        distinct = {text.strip().lower(): text for text in reversed(texts)}
        return [*distinct.values()][::-1][:MAX_WORDS]

    def to_page_data(self) -> dict[str, Any]:
        """The JSON that the page's script (templates/text.js) reads."""
        return {
            "shown": [show_token(token.text) for token in self.tokens],
            "features": [token.features.tolist() for token in self.tokens],
            "strengths": [
                [float(f"{s:.3g}") for s in token.strengths.tolist()] for token in self.tokens
            ],
            "strongest": [
                (fired.feature, fired.strength) for fired in self.rank_fired()[:MAX_LISTED]
            ],
        }

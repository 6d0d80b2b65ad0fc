"""Text whose every token carries the features that fire on it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lightning.report.catalogue import BEFORE, Catalogue
from sae_lightning.report.section import show_token

MAX_WORDS = 4  # that tell a feature
FEW_TOKENS = 20  # tokens of the catalogue's text on which a feature fires
MAX_LISTED = 100  # features of the whole text on the page


class AnnotatedToken(NamedTuple):
    """A token, and what fires on it."""

    text: str
    """As it reads, with its space."""
    read: bool
    """False where the SAE reads nothing: BOS, other special tokens, norms that are too large."""
    features: Tensor
    """[k] those that fire, the strongest first, int64"""
    strengths: Tensor
    """[k] of each, in its own units"""


class FiredFeature(NamedTuple):
    """A feature on a token."""

    feature: int
    strength: float
    """In the feature's own units."""
    share: float | None
    """Of the maximum in the catalogue's text; None where it never fired there."""
    place: int
    """Number of the token."""
    copies: int = 0
    """Copies of it that fire there too, more weakly."""


class AnnotatedText(NamedTuple):
    """A text token by token, and the catalogue of the features that fire on it."""

    tokens: Sequence[AnnotatedToken]
    catalogue: Catalogue

    def list_fired(self, place: int) -> list[FiredFeature]:
        """What fires on a token, the strongest first, and of copies only that one."""
        token, found = self.tokens[place], {}
        maximum = self.catalogue.statistics.maximum[token.features]
        values = (token.features, token.strengths, maximum, self.find_originals(token.features))
        for feature, strength, most, same in zip(*(x.tolist() for x in values), strict=True):
            if same in found:
                found[same] = found[same]._replace(copies=found[same].copies + 1)
            else:
                found[same] = FiredFeature(
                    feature, strength, strength / most if most else None, place
                )
        return [*found.values()]

    def find_originals(self, features: Tensor) -> Tensor:
        """The features of which `features` are copies, or they themselves."""
        return features if self.catalogue.copy_of is None else self.catalogue.copy_of[features]

    def rank_fired(self) -> list[FiredFeature]:
        """Each feature where it is strongest, the largest shares of a maximum first; last
        those whose maximum is one of few."""
        best: dict[int, FiredFeature] = {}
        originals = self.find_originals(torch.arange(self.catalogue.unit_count)).tolist()
        for place in range(len(self.tokens)):
            for fired in self.list_fired(place):
                known = best.get(originals[fired.feature])
                if known is None or fired.strength > known.strength:
                    best[originals[fired.feature]] = fired
        few = (self.catalogue.statistics.fired < FEW_TOKENS).tolist()
        return sorted(best.values(), key=lambda fired: (few[fired.feature], -(fired.share or 0)))

    def list_words(self, feature: int) -> list[str]:
        """Some tokens on which the catalogue has it strongest, each word once."""
        ids = self.catalogue.top.tokens[feature, :, BEFORE].tolist()
        texts = [show_token(self.catalogue.vocabulary[i]) for i in ids if i >= 0]
        return list({text.strip().lower(): text for text in reversed(texts)}.values())[::-1][
            :MAX_WORDS
        ]

    def to_page_data(self) -> dict[str, Any]:
        """For the page's script (templates/text.js)."""
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

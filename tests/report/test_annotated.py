"""The features of an annotated text: how they are ranked and how copies are merged."""

import re

import numpy as np
import pytest
import torch

from sae_lightning.report.annotated import FEW_TOKENS, AnnotatedText, AnnotatedToken
from sae_lightning.report.catalogue import BEFORE, WINDOW, Catalogue, Examples, Statistics
from sae_lightning.report.page import TEMPLATES

WORDS = [" King", "king", " law", "\n"]


@pytest.fixture
def annotated():
    """Four features on two tokens; 3 is a copy of 1, and 2 fires too rarely for its maximum to
    count."""
    fired = torch.tensor([900, 50, FEW_TOKENS - 1, 50, 0])
    maximum = torch.tensor([10.0, 4.0, 1.0, 4.0, 0.0])
    statistics = Statistics(1000, fired, maximum / 2, maximum, torch.zeros(5, 48))
    tokens = torch.full((5, 4, WINDOW), -1)
    tokens[:2, :, BEFORE] = torch.tensor([[0, 1, 2, 3], [2, 0, 2, 3]])
    n = torch.zeros(5, 4)
    top = Examples(n, tokens, tokens.half(), n.long(), n.int())
    catalogue = Catalogue("feature", WORDS, np.zeros((1, 1)), statistics, top, top)
    catalogue = catalogue._replace(copy_of=torch.tensor([0, 1, 2, 1, 4]))
    the = AnnotatedToken(" the", True, torch.tensor([0, 1, 3]), torch.tensor([5.0, 1.0, 0.5]))
    king = AnnotatedToken(
        " king", True, torch.tensor([3, 2, 4, 1]), torch.tensor([3.0, 2.0, 1.0, 0.5])
    )
    return AnnotatedText([the, king], catalogue)


def test_of_copies_the_strongest_is_listed_with_the_number_of_others_that_fire(annotated):
    assert [(f.feature, f.copies) for f in annotated.list_firings(0)] == [(0, 0), (1, 1)]
    assert [(f.feature, f.copies) for f in annotated.list_firings(1)] == [(3, 1), (2, 0), (4, 0)]


def test_a_share_is_of_the_catalogues_maximum_and_none_where_it_never_fired_there(annotated):
    assert [f.share for f in annotated.list_firings(1)] == [0.75, 2, None]


def test_features_are_ranked_by_share_of_maximum_and_rare_ones_come_last(annotated):
    ranked = [(f.feature, f.strength, f.place) for f in annotated.rank_firings()]
    assert ranked == [(3, 3, 1), (0, 5, 0), (2, 2, 1), (4, 1, 1)]


def test_peak_tokens_are_listed_once_each_the_strongest_example_first(annotated):
    assert annotated.list_peak_tokens(0) == [" King", " law", "↵"]
    assert annotated.list_peak_tokens(1) == [" law", " King", "↵"]
    assert annotated.list_peak_tokens(4) == []


@pytest.mark.parametrize("script", ["unit.js", "text.js", "browser.js"])
def test_a_script_of_the_page_takes_only_what_those_before_it_give(script):
    code = {name: (TEMPLATES / f"{name}.js").read_text() for name in ("blocks", "unit")}
    given = {
        "blocks": re.findall(r"^return \{(.*)\};", code["blocks"], re.MULTILINE),
        "units": re.findall(r"^return \{(.*)\};", code["unit"], re.MULTILINE),
    }
    taken = re.findall(r"\{([^{}]*)\} = (blocks|units)\b", (TEMPLATES / script).read_text())
    assert taken
    for names, source in taken:
        assert {*names.replace(" ", "").split(",")} <= {
            *given[source][0].replace(" ", "").split(",")
        }

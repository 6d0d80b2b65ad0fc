"""Concepts in text, and how well single units detect them: on hand-made tokens and strengths."""

import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score
from torch import Generator, Tensor

from sae_lightning.analysis.theory import detection
from sae_lightning.analysis.theory.detection import FeatureCounts, NeuronCounts, find_detector
from sae_lightning.analysis.theory.token_concepts import CONCEPTS, tag_tokens
from sae_lightning.report.catalogue import EDGES


def words(text: str, concept: str) -> list[str]:
    """The tokens of a text, cut before spaces and line ends, that belong to a concept."""
    import re

    pieces = re.findall(r"\s*\S+|\s+", text)
    column = list(CONCEPTS).index(concept)
    chosen = tag_tokens(pieces)[:, column].tolist()
    return [piece.strip() for piece, is_member in zip(pieces, chosen, strict=True) if is_member]


@pytest.mark.parametrize(
    ("concept", "text", "expected"),
    [
        ("thou", "And thou shalt love thy kin, Thine own; you too", "thou thy Thine"),
        ("negation", "I cannot say no, nor notice knots", "cannot no, nor"),
        ("kinship", "Her brother's grandson, a fatherly uncle", "brother's uncle"),
        ("numbers", "twenty men, 1,400 ships, someone", "twenty 1,400"),
        ("question words", "Wherefore art thou? whatever", "Wherefore"),
        ("names of speakers", "\n\n**KING HENRY**  \nWhat **is** it", "**KING HENRY**"),
        ("stage directions", "_Enter the Duke_ Sir, [Exit] a_b_c", "_Enter the Duke_ [Exit]"),
        ("capitals in mid-sentence", "So says Rome. And I, by Jove, am", "Rome. Jove,"),
        ("starts of lines", "one two\nthree four\n\nfive", "three five"),
        ("ends of sentences", "Go. Mr Fox, why? 'Ay!' 3.5 men", "Go. why? 'Ay!'"),
        (
            "words with an apostrophe",
            "'Tis o'er, 'twas remember'd 'quote'",
            "'Tis o'er, 'twas remember'd",
        ),
        ("words in -ing", "the king is going, sing! being", "going, being"),
    ],
)
def test_a_concept_holds_these_words(concept, text, expected):
    assert words(text, concept) == expected.split()


def test_every_piece_of_a_word_belongs_and_no_neighbour():
    pieces = ["The", " grand", "mo", "ther", " mo", "thed", ",", " fa", "ther"]
    column = list(CONCEPTS).index("kinship")
    assert tag_tokens(pieces)[:, column].tolist() == [
        False,
        True,
        True,
        True,
        *[False] * 3,
        True,
        True,
    ]


# One concept, about a quarter of 4,000 tokens; half of the tokens in each half of the text.
N = 4000
GENERATOR = Generator().manual_seed(0)
MEMBER = torch.rand(N, 1, generator=GENERATOR) < 0.25
HALF = torch.arange(N) % 2
NOISE = torch.rand(N, 6, generator=GENERATOR)


def by_feature(strengths: Tensor, member: Tensor = MEMBER):
    counts, features = FeatureCounts(member.shape[1], strengths.shape[1]), strengths.shape[1]
    for part in zip(strengths.split(999), member.split(999), HALF.split(999), strict=True):
        counts.add(*part, torch.arange(features))
    return counts.result()


def by_neuron(x: Tensor, member: Tensor = MEMBER):
    counts = NeuronCounts(member.shape[1])
    for part in zip(x.split(999), member.split(999), HALF.split(999), strict=True):
        counts.add(*part)
    return counts.result()


def planted_feature() -> Tensor:
    """Feature 3 is 2 to 3 on the concept and below 1 elsewhere; the others are random."""
    strengths = (NOISE - 0.5).relu()
    strengths[:, 3] = NOISE[:, 3] + 2 * MEMBER[:, 0]
    return strengths


def test_a_planted_feature_is_found_with_its_threshold():
    detector = find_detector(by_feature(planted_feature()), 0)
    assert (detector.unit, detector.f1, detector.precision, detector.recall) == (3, 1, 1, 1)
    assert (detector.auroc_unit, detector.auroc) == (3, 1)
    assert 1 <= detector.threshold <= 2
    assert not detector.below


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_neuron_is_found_in_either_direction(sign):
    x = NOISE - 0.5
    x[:, 4] = sign * (NOISE[:, 4] + 3 * MEMBER[:, 0])
    detector = find_detector(by_neuron(x), 0)
    assert (detector.unit, detector.below) == (4, sign < 0)
    assert detector.f1 > 0.99  # a rank among the first tokens is near the gap
    assert detector.auroc > 0.99


def test_random_features_are_at_chance():
    detector = find_detector(by_feature(NOISE), 0)
    share = MEMBER[HALF == 1].float().mean().item()
    assert detector.f1 == pytest.approx(2 * share / (1 + share), abs=0.02)
    assert detector.auroc == pytest.approx(0.5, abs=0.03)


def test_what_predicts_by_accident_on_the_first_half_does_not_score():
    strengths = torch.zeros(N, 2)
    strengths[:, 0] = (MEMBER[:, 0] & (HALF == 0)).float()  # perfect, but there only
    strengths[:, 1] = MEMBER[:, 0] * (torch.arange(N) % 10 > 1)  # of the concept, 80 %
    detector = find_detector(by_feature(strengths), 0)
    assert (detector.unit, detector.chosen_f1) == (0, 1)
    assert (detector.f1, detector.recall) == (0, 0)
    assert (detector.auroc_unit, detector.auroc) == (0, 0.5)


def test_scores_by_hand():
    # The second half: 1000 tokens of the concept fire at 4, 500 at 1; 500 others at 1.
    member = torch.zeros(N, 1, dtype=torch.bool)
    strengths = torch.zeros(N, 1)
    second = (HALF == 1).nonzero()[:, 0]
    member[second[:1500]] = True
    strengths[second[:1000]] = 4.0
    strengths[second[1000:2000]] = 1.0
    # The first half wants a threshold between them.
    first = (HALF == 0).nonzero()[:, 0]
    member[first[:1000]] = True
    strengths[first[:1000]] = 4.0
    strengths[first[1000:]] = 1.0
    detector = find_detector(by_feature(strengths, member), 0)
    assert 1 < detector.threshold <= 4
    assert (detector.precision, detector.recall) == pytest.approx((1, 2 / 3))
    assert detector.f1 == pytest.approx(0.8)
    # of 1500 x 500 pairs: 1000 x 500 above, 500 x 500 equal, which count half
    assert detector.auroc == pytest.approx((1000 + 250) / 1500)


def test_what_ranks_best_need_not_be_what_says_yes_best():
    # Feature 0 fires on half of the concept and on nothing else: F1 2/3, AUROC 3/4. Feature 1 fires
    # on all of it and on 40 % of the rest: F1 2 x 0.25 / (0.55 + 0.25) = 0.625, AUROC 0.8.
    turn = torch.arange(N) // 2 % 10
    is_one = MEMBER[:, 0]
    strengths = torch.stack([is_one & (turn < 5), is_one | (turn < 4)], dim=1).float()
    detector = find_detector(by_feature(strengths), 0)
    assert (detector.unit, detector.auroc_unit) == (0, 1)
    assert (detector.f1, detector.auroc) == pytest.approx((2 / 3, 0.8), abs=0.03)


def test_counts_are_of_all_tokens_and_do_not_depend_on_the_cutting():
    strengths, x = planted_feature(), NOISE - 0.5
    for counts in (by_feature(strengths), by_neuron(x)):
        for half in (0, 1):
            assert (counts.read(half, 0).sum(dim=1) == MEMBER[half::2].sum()).all()
            assert (counts.read(half, 1).sum(dim=1) == N // 2).all()
    whole = FeatureCounts(1, 6)
    whole.add(strengths[:500], MEMBER[:500], HALF[:500], torch.arange(6))
    whole.result()  # looking at it changes nothing
    whole.add(strengths[500:], MEMBER[500:], HALF[500:], torch.arange(6))
    assert all(map(torch.equal, whole.result()[:-1], by_feature(strengths)[:-1]))


def test_counting_and_scoring_in_small_parts_gives_the_same(monkeypatch):
    whole = by_feature(NOISE)
    expected_detector = find_detector(whole, 0)
    for limit in ("STRENGTHS_AT_ONCE", "CELLS_AT_ONCE", "SCORED_AT_ONCE"):
        monkeypatch.setattr(detection, limit, 4)
    strengths, member, half = NOISE[:300], MEMBER[:300], HALF[:300]
    counts = FeatureCounts(1, 6)
    counts.add(strengths, member, half, torch.arange(6))
    bins = 1 + ((strengths[member[:, 0] & (half == 0)].log2() - EDGES[0].log2()) * 2).floor()
    expected = [torch.bincount(b.int(), minlength=len(EDGES) + 1) for b in bins.T]
    assert torch.equal(counts.result().read(0, 0), torch.stack(expected).int())
    assert find_detector(whole, 0) == expected_detector


def test_ranks_are_taken_from_no_more_numbers_than_quantile_takes(monkeypatch):
    monkeypatch.setattr(detection, "MAX_QUANTILE_VALUES", 6 * 50 + 5)
    counts = NeuronCounts(1)
    counts.add(NOISE, MEMBER, HALF)
    assert torch.equal(counts.edges, torch.quantile(NOISE[:50], detection.QUANTILE_LEVELS, dim=0).T)
    assert counts.result().tokens.sum(dim=0)[-1] == N  # all are counted


def test_units_can_be_chosen_among_a_few_only():
    counts = by_feature(planted_feature())
    assert find_detector(counts, 0, torch.tensor([0, 5])).unit in (0, 5)
    detector = find_detector(counts, 0, torch.tensor([5, 3]))
    assert (detector.unit, detector.auroc_unit) == (3, 3)


@pytest.mark.parametrize(("kind", "sign"), [(by_feature, 1), (by_neuron, 1), (by_neuron, -1)])
def test_scores_are_those_of_the_strengths_themselves_where_these_are_few(kind, sign):
    """0, 1, 2, 4 or 8, the greater the likelier on the concept: in bins of their own."""
    raised = NOISE + 0.1 * torch.arange(6) * MEMBER
    values = sign * torch.tensor([0.0, 1, 2, 4, 8])[(raised * 5).long().clamp(max=4)]
    detector, second = find_detector(kind(values), 0), HALF == 1
    truth, unit = MEMBER[second, 0], values[second, detector.unit]
    said = unit < detector.threshold if detector.below else unit >= detector.threshold
    if kind is by_feature:
        said &= unit > 0  # above 0, where a threshold is 0
    assert detector.below == (sign < 0)
    assert detector.f1 == pytest.approx(f1_score(truth, said))
    assert detector.precision == pytest.approx(precision_score(truth, said))
    assert detector.recall == pytest.approx(recall_score(truth, said))
    auroc = roc_auc_score(truth, sign * values[second, detector.auroc_unit])
    assert detector.auroc == pytest.approx(auroc)

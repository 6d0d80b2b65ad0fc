"""Recovery scores against closed-form answers."""

import math

import pytest
import torch

from sae_lightning.stream import recovery as recovery_module
from sae_lightning.stream.recovery import (
    Recovery,
    compute_cosines,
    match_features,
    measure_concept_overlap,
    measure_recovery,
)

EYE = torch.eye(4)
#               a    b    c    d      d never fires
STRENGTHS = torch.tensor(
    [
        [1.0, 2.0, 0.0, 0.0],
        [3.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 2.0, 0.0],
        [0.0, 0.0, 4.0, 0.0],
    ]
)


def weights(W_dec, W_enc=None, bias=None, **others) -> dict[str, torch.Tensor]:
    features = len(W_dec)
    return {
        "W_dec": W_dec,
        "W_enc": W_dec.T if W_enc is None else W_enc,
        "b_enc": torch.full((features,), -0.5) if bias is None else torch.tensor(bias),
        "b_dec": torch.zeros(W_dec.shape[1]),
    } | others


def score(W_dec, features, directions=EYE, **others) -> Recovery:
    samples = [(STRENGTHS @ directions, STRENGTHS, features)]
    return measure_recovery(directions, weights(W_dec, **others), samples)


def test_a_perfect_dictionary_scores_one_everywhere():
    recovery = score(3 * EYE, STRENGTHS / 3)
    assert recovery == pytest.approx(
        Recovery(
            mmcs=1,
            recovered=1,
            precision=1,
            recall=1,
            feature_readout=1,
            projection_readout=1,
            concept_overlap=0,
            encoder_agreement=1,
            negative_bias=1,
        )
    )


def test_the_order_of_features_does_not_matter():
    order = torch.tensor([2, 0, 3, 1])
    assert score(EYE[order], STRENGTHS[:, order]) == pytest.approx(score(EYE, STRENGTHS))


def test_samples_may_come_in_parts():
    parts = [(STRENGTHS[a:b], STRENGTHS[a:b], STRENGTHS[a:b]) for a, b in ((0, 1), (1, 4))]
    assert measure_recovery(EYE, weights(EYE), parts) == pytest.approx(score(EYE, STRENGTHS))


def test_the_matching_is_the_best_of_all_not_the_best_of_each():
    # greedy would take 0.9 and be left with 0.1: 1.0 < 0.8 + 0.7
    table = torch.tensor([[0.9, 0.8], [0.7, 0.1]])
    matching = match_features(table)
    assert matching.concepts.tolist() == [0, 1]
    assert matching.features.tolist() == [1, 0]
    assert matching.cosine.tolist() == pytest.approx([0.8, 0.7])


def test_a_concept_split_over_two_features_is_recalled_in_part():
    # concept a fires on samples 0 and 1, each of which has a feature of its own
    W_dec = torch.cat([EYE, EYE[:1]])
    features = torch.cat([STRENGTHS, torch.zeros(4, 1)], dim=1)
    features[1, 4], features[1, 0] = features[1, 0].item(), 0.0
    recovery = score(W_dec, features)
    assert (recovery.mmcs, recovery.recovered, recovery.precision) == (1, 1, 1)
    assert recovery.recall == pytest.approx((1 / 2 + 1 + 1) / 3)


def test_a_feature_that_fires_too_often_is_imprecise():
    features = STRENGTHS.clone()
    features[2, 0] = features[3, 0] = 0.1  # a: 2 of 4 right
    recovery = score(EYE, features)
    assert recovery.precision == pytest.approx((2 / 4 + 1 + 1) / 3)
    assert recovery.recall == 1


def test_dead_features_neither_detect_nor_read():
    features = STRENGTHS.clone()
    features[:, 1] = 0
    recovery = score(EYE, features)
    assert (recovery.mmcs, recovery.recovered) == (1, 1)  # the direction is there
    assert recovery.precision == recovery.recall == pytest.approx(2 / 3)
    assert recovery.feature_readout == pytest.approx(2 / 3)
    assert recovery.projection_readout == pytest.approx(1)


def test_a_concept_that_never_fires_is_in_no_mean_over_samples():
    features = STRENGTHS.clone()
    features[0, 3] = 1.0  # a false alarm for d, on which no sample can say more
    assert score(EYE, features).precision == 1


def test_fewer_features_than_concepts_leave_some_unmatched():
    recovery = score(EYE[:2], STRENGTHS[:, :2])
    assert recovery.mmcs == pytest.approx(0.5)
    assert recovery.recovered == 0.5
    assert recovery.precision == recovery.recall == pytest.approx(2 / 3)  # c is seen, and missed
    assert recovery.encoder_agreement == pytest.approx(1)


def test_two_features_on_one_concept_recover_one():
    recovery = score(EYE[[0, 0, 2, 3]], STRENGTHS[:, [0, 0, 2, 3]])
    assert recovery.recovered == 0.75
    assert recovery.mmcs == pytest.approx(0.75)


@pytest.mark.parametrize(("cosine", "recovered"), [(0.89, 0.75), (0.91, 1.0)])
def test_a_concept_is_recovered_above_a_cosine_of_nine_tenths(cosine, recovered):
    W_dec = EYE.clone()
    W_dec = torch.cat([W_dec, torch.zeros(4, 1)], dim=1)  # a fifth dimension to turn into
    W_dec[0] = torch.tensor([cosine, 0, 0, 0, math.sqrt(1 - cosine**2)])
    directions = torch.eye(5)[:4]
    recovery = score(W_dec, STRENGTHS, directions)
    assert recovery.recovered == recovered
    assert recovery.mmcs == pytest.approx((3 + cosine) / 4)


def test_an_opposite_direction_is_not_its_concept():
    table = compute_cosines(EYE, -EYE)
    assert table.diagonal().tolist() == [-1.0] * 4
    assert score(-EYE, STRENGTHS).recovered == 0


def test_overlap_is_the_nearest_other_concept():
    # 60 degrees between a and b; c at a right angle to both
    directions = torch.tensor([[1.0, 0, 0], [0.5, math.sqrt(0.75), 0], [0, 0, 1]])
    samples = [(STRENGTHS[:, :3] @ directions, STRENGTHS[:, :3], STRENGTHS[:, :3])]
    recovery = measure_recovery(directions, weights(directions), samples)
    assert recovery.concept_overlap == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert recovery.feature_readout == pytest.approx(1)
    assert recovery.projection_readout < 0.95, "the projection also sees what is not orthogonal"


def test_encoder_and_decoder_are_compared_where_a_concept_was_recovered():
    # columns at 60 degrees to their rows for a and b; c and d point elsewhere and do not count
    W_enc = EYE.clone()
    W_enc[:, 0] = torch.tensor([0.5, 0, math.sqrt(0.75), 0])
    W_enc[:, 1] = torch.tensor([0, 0.5, 0, math.sqrt(0.75)])
    W_dec = EYE.clone()
    W_dec[2:] = torch.tensor([[1.0, 1, 0, 0], [1, -1, 0, 0]])
    recovery = score(W_dec, STRENGTHS, W_enc=W_enc)
    assert recovery.recovered == 0.5
    assert recovery.encoder_agreement == pytest.approx(0.5)


def test_a_bias_is_negative_below_the_threshold():
    bias = [-0.5, 0.5, 0.2, 0.0]
    assert score(EYE, STRENGTHS, bias=bias).negative_bias == 0.25
    threshold = torch.full((4,), 0.3)
    assert score(EYE, STRENGTHS, bias=bias, threshold=threshold).negative_bias == 0.75


def test_nothing_recovered_has_no_encoder_to_compare():
    recovery = score(torch.zeros(2, 4), torch.zeros(4, 2))
    assert (recovery.mmcs, recovery.recovered, recovery.precision, recovery.recall) == (0, 0, 0, 0)
    assert math.isnan(recovery.encoder_agreement) and math.isnan(recovery.negative_bias)


def test_a_feature_that_is_not_finite_is_no_concepts_and_harms_no_other():
    W_dec = torch.eye(4)
    W_dec[3] = float("nan")
    matching = match_features(compute_cosines(torch.eye(4), W_dec))
    assert sorted(matching.features.tolist()) == [0, 1, 2, 3]
    assert (matching.cosine > 0.9).sum() == 3


def test_the_overlap_of_concepts_is_with_others_and_in_any_number_of_parts(monkeypatch):
    # cosines: 0.6 between the first two, 0.8 and 0 with the third
    directions = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    for rows in (1, 2, 1024):
        monkeypatch.setattr(recovery_module, "COMPARED_CONCEPTS", rows)
        assert measure_concept_overlap(directions) == pytest.approx((0.6 + 0.8 + 0.8) / 3)

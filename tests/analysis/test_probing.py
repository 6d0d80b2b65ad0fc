"""Probes find the unit that carries a label, and nothing where there is nothing."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from sae_lightning.analysis.collect import collect
from sae_lightning.analysis.probing import linear
from sae_lightning.analysis.probing.labelled_text import LabelledText
from sae_lightning.analysis.probing.linear import (
    ALL_C,
    FoldScore,
    FoldSplit,
    measure_aurocs,
    score_predictions,
)
from sae_lightning.analysis.probing.probe_sections import describe_winner, make_probe_sections
from sae_lightning.analysis.probing.probes import PieceMeans, ProbeScore, fit_probes, probe
from sae_lightning.files import make_jsonable
from sae_lightning.llm.capture import capture

CLASSES, PIECES, CONTEXT = 3, 120, 12
WORD = [3, 5, 8]  # places of the word that gives the class away


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cut(x: torch.Tensor, labels: LabelledText, tested: int) -> FoldSplit:
    return FoldSplit(x.numpy(), labels.class_indices.numpy(), labels.fold.numpy(), tested)


@pytest.fixture
def labels() -> LabelledText:
    """120 pieces of three classes in turn; those of class c hold token 10 + c three times."""
    class_indices = torch.arange(PIECES) % CLASSES
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 100, (PIECES, CONTEXT), generator=random)
    tokens[:, 0] = 0
    tokens[:, WORD] = 10 + class_indices[:, None]
    text = torch.ones_like(tokens, dtype=torch.bool)
    text[:, 0] = False
    return LabelledText(
        label="colour",
        classes=["red", "green", "blue"],
        class_indices=class_indices,
        fold=torch.arange(PIECES) // CLASSES % 4,
        tokens=tokens,
        is_text=text,
        notes=["Made up."],
    )


@pytest.fixture
def planted(labels) -> dict[str, torch.Tensor]:
    """Feature 7 + c is active in class c only; neurons know of no class."""
    features = noise(PIECES, 30).relu()
    features[:, 7:10] = torch.eye(CLASSES)[labels.class_indices]
    return {"features": features, "neurons": noise(PIECES, 20, seed=1)}


@pytest.mark.slow
def test_a_unit_that_carries_the_label_is_found_and_suffices(labels, planted):
    probes = fit_probes(planted, labels)
    assert (
        probes.find_score("features", 1).accuracy == probes.find_score("features", 1).auroc == 1.0
    )
    assert [(best.unit, best.folds) for best in probes.best_units["features"]] == [
        (7, 4), (8, 4), (9, 4)
    ]  # fmt: skip
    assert all(best.auroc == 1.0 for best in probes.best_units["features"])
    assert probes.find_score("neurons", 1).accuracy < 0.55


@pytest.mark.slow
def test_shuffled_labels_are_told_no_better_than_by_chance(labels, planted):
    found = []
    for seed in range(6):
        order = torch.randperm(PIECES, generator=torch.Generator().manual_seed(seed))
        shuffled = labels._replace(class_indices=labels.class_indices[order])
        found.append(fit_probes(planted, shuffled, k=(1,)).scores)
    for scores in zip(*found, strict=True):  # one kind of units each
        accuracy = sum(score.accuracy for score in scores) / len(scores)
        auroc = sum(score.auroc for score in scores) / len(scores)
        assert (accuracy, auroc) == pytest.approx((1 / CLASSES, 0.5), abs=0.07), scores[0]


def test_nothing_of_a_tested_piece_reaches_its_probe(labels, planted):
    """A unit that knows the label of one fold only is never chosen to test that fold."""
    x = noise(PIECES, 30).relu()
    first = labels.fold == 0
    x[first, 5] = 100.0 * labels.class_indices[first]
    assert 5 not in cut(x, labels, 0).score_best_units()[0]
    changed = x.clone()
    changed[first] = 7.0
    before, after = (cut(each, labels, 0) for each in (x, changed))
    assert np.array_equal(before.fit_x, after.fit_x)
    assert np.array_equal(before.aurocs, after.aurocs)


def test_all_units_tell_what_no_single_one_does(labels):
    """Each class is the sum of 20 units, each of them nearly all noise."""
    x = noise(PIECES, 60, seed=4)
    for number in range(CLASSES):
        x[labels.class_indices == number, 20 * number : 20 * (number + 1)] += 0.7
    fold = cut(x, labels, 0)
    assert fold.fit_all().auroc > 0.95 > 0.85 > fold.fit_sparse(1).auroc


def test_more_units_than_pieces_give_the_same_probe_as_in_the_space_of_the_pieces(labels):
    wide = noise(PIECES, 500, seed=5)
    wide[:, :9] += torch.eye(CLASSES).repeat(1, 3)[labels.class_indices]
    fold = cut(wide, labels, 1)
    found = fold.fit_all()
    scale = 500**-0.5
    direct = []
    for c in ALL_C:
        model = LogisticRegression(C=c, max_iter=5000, tol=1e-8)
        model.fit(fold.fit_x * scale, fold.fit_class_indices)
        scores = model.decision_function(fold.test_x * scale)
        direct.append(score_predictions(scores, fold.test_class_indices).auroc)
    assert min(abs(found.auroc - auroc) for auroc in direct) < 0.01


def test_two_classes_need_one_probe(labels, planted):
    two = labels.class_indices < 2
    x = planted["features"][two][:, 7:8]  # the unit of class 0 tells class 1 by its absence
    pair = labels._replace(class_indices=labels.class_indices[two], fold=labels.fold[two])
    fold = cut(torch.cat([x, noise(int(two.sum()), 3)], 1), pair, 0)
    assert fold.fit_sparse(1) == fold.fit_all() == (1.0, 1.0)
    assert fold.score_best_units()[1].tolist() == [1.0, 1.0]


def test_auroc_counts_pairs_and_ties_for_half(monkeypatch):
    x = np.array([[3.0], [1.0], [1.0], [0.0]])
    target = np.array([0, 0, 1, 1])
    # pairs 3>1, 3>0, 1=1, 1>0: 3.5 of 4
    assert measure_aurocs(x, target, 2)[:, 0].tolist() == [0.875, 0.125]
    many, classes = noise(50, 4).round(decimals=1).numpy(), np.arange(50) % 3
    expected = [[roc_auc_score(classes == c, unit) for unit in many.T] for c in range(3)]
    assert np.allclose(measure_aurocs(many, classes, 3), expected)
    monkeypatch.setattr(linear, "UNITS_AT_ONCE", 3)  # a part of the units at a time
    assert np.allclose(measure_aurocs(many, classes, 3), expected)


@pytest.mark.parametrize("units", [10, 200])
def test_a_unit_that_never_changes_tells_nothing(labels, units):
    """Whatever it is on the tested fold, where it was never fitted."""
    x = noise(PIECES, units, seed=7)
    x[:, :CLASSES] += torch.eye(CLASSES)[labels.class_indices]
    x[:, 5] = 0.1
    other = x.clone()
    other[labels.fold == 0, 5] = 50 * noise(int((labels.fold == 0).sum()))
    before, after = (cut(each, labels, 0) for each in (x, other))
    assert not before.fit_x[:, 5].any()
    assert 5 not in before.score_best_units()[0]
    assert before.fit_sparse(2) == after.fit_sparse(2)
    assert before.fit_all() == pytest.approx(after.fit_all(), abs=1e-6)


@pytest.mark.slow
def test_a_planted_feature_is_found_through_the_llm(labels, subject):
    """The SAE's last three features fire on the three words that are the classes."""
    site = subject.sites.source
    x = capture(subject.llm.model, labels.tokens, [site])[site][:, 1:].flatten(0, 1)
    words = labels.tokens[:, 1:].flatten()
    mean = x.mean(0)
    spoken = torch.stack([words == 10 + c for c in range(CLASSES)], 1).float()
    columns = torch.linalg.lstsq(x - mean, spoken - spoken.mean(0)).solution  # [d, classes]
    subject.sae.b_dec.data.zero_()
    subject.sae.W_enc.data[:, -CLASSES:] = columns
    subject.sae.b_enc.data[-CLASSES:] = -mean @ columns - 0.4
    probes = probe(subject, labels, k=(1, 2), batch=7)
    assert [best.unit for best in probes.best_units["features"]] == [29, 30, 31]
    assert probes.find_score("features", 1).accuracy > 0.95
    assert (
        probes.find_score("features", 1).accuracy > probes.find_score("neurons", 1).accuracy + 0.1
    )
    assert probes.context == CONTEXT


def test_pieces_are_pooled_over_their_own_tokens_only(labels, subject):
    """A padded piece has the representation of the piece without its padding."""
    short = labels.tokens[:2].clone()
    short[:, 7:] = 1
    text = labels.is_text[:2].clone()
    text[:, 7:] = False
    pooled = []
    for tokens, mask in ((short, text), (short[:, :7], text[:, :7])):
        part = labels._replace(tokens=tokens, is_text=mask)
        reducer = PieceMeans(2, subject.features)
        collect(subject, part.split_batches(1), [reducer], total=2)
        pooled.append(reducer.result())
    for units in ("features", "neurons"):
        torch.testing.assert_close(pooled[0][units], pooled[1][units], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_sections_tell_the_numbers(labels, planted):
    probes = fit_probes(planted, labels, k=(1, 2))
    comparison, units = make_probe_sections(probes)
    assert "AUROC of 1.00 with features" in comparison.lead
    assert "features are ahead by" in comparison.lead and "in 4 of 4 folds" in comparison.lead
    assert comparison.table.header == ["", "k = 1", "k = 2", "all"]
    rows = {row[0]: row[1:] for row in comparison.table.rows}
    assert rows["features: accuracy"][0] == "1.000 ± 0.000"
    assert rows["random directions: AUROC"][2] == "", "all random directions are all neurons again"
    assert comparison.numbers["most frequent class"] == "accuracy 0.333"
    assert comparison.numbers["pieces of text"] == "120 of up to 12 tokens"
    assert "For 3 of 3 classes the best feature does better" in units.lead
    assert {tuple(row[:4]) for row in units.table.rows} == {
        ("red", "40", "7", "4"), ("green", "40", "8", "4"), ("blue", "40", "9", "4")
    }  # fmt: skip
    for figure in comparison.figures.values():
        assert [trace.name for trace in figure.data][:2] == ["features", "neurons"]
        assert figure.data[0].x == ("1", "2", "all")
        json.dumps(json.loads(figure.to_json()), allow_nan=False)
    saved = json.loads(json.dumps(make_jsonable(probes.to_dict()), allow_nan=False))
    assert [*saved["scores"][0]] == ["units", "k", "folds", "accuracy", "auroc"]
    assert saved["matches"]["features"]["red"]["unit"] == 7


def test_the_verdict_is_on_the_side_of_the_mean():
    features = ProbeScore("features", 1, [FoldScore(0, 0.8), FoldScore(0, 0.5)])
    neurons = ProbeScore("neurons", 1, [FoldScore(0, 0.6), FoldScore(0, 0.6)])
    assert describe_winner(features, neurons) == "features are ahead by 0.05, in 1 of 2 folds"
    assert describe_winner(neurons, features) == "neurons are ahead by 0.05, in 1 of 2 folds"


def test_a_tie_is_on_no_side():
    features = ProbeScore("features", 1, [FoldScore(0, 0.8), FoldScore(0, 0.6)])
    neurons = ProbeScore("neurons", 1, [FoldScore(0, 0.6), FoldScore(0, 0.6)])
    assert describe_winner(features, neurons) == "features are ahead by 0.10, in 1 of 2 folds"
    assert describe_winner(neurons, neurons) == "neither is ahead"


@pytest.mark.slow
def test_a_score_is_the_mean_over_folds_with_its_standard_error(labels, planted):
    probes = fit_probes(planted, labels, k=(1,))
    outcomes = [FoldScore(0.8, 0.5), FoldScore(0.5, 0.9)]
    scores = [score._replace(fold_scores=outcomes) for score in probes.scores]
    table = make_probe_sections(probes._replace(scores=scores))[0].table
    rows = {row[0]: row[1] for row in table.rows}
    assert rows["features: accuracy"] == "0.650 ± 0.150"  # 0.3 / sqrt(2) / sqrt(2)
    assert rows["features: AUROC"] == "0.700 ± 0.200"


@pytest.mark.slow
def test_random_directions_are_as_many_as_features_and_k_is_less_than_all(labels, planted):
    probes = fit_probes(planted, labels, k=(20, 25, 30))  # of 30 features and 20 neurons
    tested = {(score.kind, score.k) for score in probes.scores}
    assert tested == {
        ("features", 20), ("features", 25), ("features", None), ("neurons", None),
        ("random directions", 20), ("random directions", 25),
    }  # fmt: skip


@pytest.mark.parametrize("tested", range(4))
def test_how_strongly_to_regularise_is_told_by_a_fitted_fold(labels, tested):
    """Pieces of the chosen strength do best on a fold that neither fits nor tests."""
    x = noise(PIECES, 40, seed=6)
    x[:, :3] += 0.6 * torch.eye(CLASSES)[labels.class_indices]
    fold = cut(x, labels, tested)
    assert 0 < fold.is_validation.sum() < len(fold.is_validation)
    fitted_folds = labels.fold[labels.fold != tested]
    assert len(fitted_folds[torch.from_numpy(fold.is_validation)].unique()) == 1

    def fitted(c, which):
        model = LogisticRegression(C=c, max_iter=5000)
        return model.fit(fold.fit_x[which] * 40**-0.5, fold.fit_class_indices[which])

    def auroc(model, x, target):
        scores = model.decision_function(x * 40**-0.5)
        return sum(roc_auc_score(target == c, scores[:, c]) for c in range(CLASSES)) / CLASSES

    checked = fold.fit_x[fold.is_validation], fold.fit_class_indices[fold.is_validation]
    tried = {c: auroc(fitted(c, ~fold.is_validation), *checked) for c in ALL_C}
    assert max(tried.values()) > min(tried.values())
    best = max(ALL_C, key=tried.get)
    expected = auroc(fitted(best, slice(None)), fold.test_x, fold.test_class_indices)
    assert fold.fit_all().auroc == pytest.approx(expected, abs=2e-3)

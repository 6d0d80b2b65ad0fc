"""What the report of a sweep claims, on numbers worked by hand."""

import math

import pytest
from test_means import seed_run, sweep_of

from sae_lightning.report.comparison import (
    BETTER,
    MAX_SENTENCES,
    OTHER_L0,
    TIED,
    UNKNOWN,
    WORSE,
    compare_with_controls,
    write_claims,
)
from sae_lightning.report.means import MeansTable
from sae_lightning.report.sweep_report import PAGE, write_report
from sae_lightning.report.sweep_table import SweepTable

NAN = math.nan
SEEDS = [0.70, 0.72, 0.74]


def judge(runs) -> tuple[list[str], list[str]]:
    """Verdicts on explained variance, and all claims."""
    means = MeansTable(SweepTable(runs))
    comparisons = compare_with_controls(means)
    verdicts = [c.verdict for c in comparisons if c.metric == "explained_variance"]
    return verdicts, write_claims(means, comparisons)


@pytest.mark.parametrize(
    ("control", "verdict", "end"),
    [
        ([0.60, 0.61, 0.62], BETTER, "0.0100 at L0 32.0: training the decoder is worth 0.1100."),
        ([0.80, 0.81, 0.82], WORSE, ": the control is better by 0.0900."),
        ([0.69, 0.71, 0.73], TIED, ": they differ by 0.0100, which is not significant."),
        ([0.69], TIED, ": they differ by 0.0300, which is not significant."),
    ],
)  # fmt: skip
def test_a_claim_follows_from_the_difference_and_its_noise(tmp_path, control, verdict, end):
    runs = sweep_of(tmp_path, {("topk", None): SEEDS, ("topk", "frozen_decoder"): control})
    verdicts, (claim,) = judge(runs)
    assert verdicts == [verdict]
    start = "topk explains 0.7200 ± 0.0200 of the variance at L0 32.0; its best control, frozen_dec"
    assert claim.startswith(start) and claim.endswith(end)


def test_of_one_seed_each_the_noise_is_unknown(tmp_path):
    verdicts, (claim,) = judge(sweep_of(tmp_path, {("topk", None): [0.7], ("topk", "pca"): [0.6]}))
    assert verdicts == [UNKNOWN]
    assert claim.endswith("differ by 0.1000; with so few seeds, the noise is unknown.")


def test_the_best_control_is_the_best_at_the_same_l0_if_there_is_one(tmp_path):
    trained = [seed_run(tmp_path, seed, ev) for seed, ev in enumerate(SEEDS)]
    denser = [seed_run(tmp_path, 0, 0.9, "pca", l0=35.3)]  # 10.3 % more than 32
    verdicts, (claim,) = judge([*trained, *denser])
    assert verdicts == [OTHER_L0]
    assert "pca, 0.9000 at L0 35.3: " in claim and "only SAEs of the same L0" in claim
    near = [seed_run(tmp_path, 0, 0.5, "frozen_encoder", l0=35.1)]
    verdicts, (claim,) = judge([*trained, *denser, *near])
    assert verdicts == [BETTER] and "frozen_encoder, 0.5000" in claim


def test_where_lower_is_better_the_best_control_is_the_lowest(tmp_path):
    kl = {None: 0.2, "pca": 0.3, "frozen_decoder": 0.5}
    runs = [seed_run(tmp_path, 0, 0.7, control, kl=value) for control, value in kl.items()]
    means = MeansTable(SweepTable(runs))
    (found,) = (c for c in compare_with_controls(means) if c.metric == "kl")
    assert means.kinds[found.control] == "pca"
    assert found.difference == pytest.approx(-0.1)


def test_ce_recovered_is_shown_beside_a_control_as_it_is_compared(tmp_path):
    """1.5 and 0.9 count as 1 and 0.9: mean 0.95, spread sqrt(2) 0.05 = 0.0707."""
    of_trained = [(0, 1.5), (1, 0.9)]
    lossless = {"ce_zero": 9.0, "ce_clean": 3.0}
    runs = [seed_run(tmp_path, n, 0.7, ce_recovered=x, **lossless) for n, x in of_trained]
    runs.append(seed_run(tmp_path, 0, 0.7, "pca", ce_recovered=1.2, **lossless))
    means = MeansTable(SweepTable(runs))
    assert means.format_cell(0, "ce_recovered") == "1.2000 ± 0.4243"
    assert means.format_compared(0, "ce_recovered") == "0.9500 ± 0.0707"
    assert means.format_compared(1, "ce_recovered") == "1.0000"
    write_report(tmp_path, runs)
    page = (tmp_path / PAGE).read_text("utf8")
    comparisons, all_saes = page.split("<h2>All SAEs</h2>")
    assert "0.9500 ± 0.0707" in comparisons and "CE recovered above 1 counts" in comparisons
    assert "1.2000 ± 0.4243" in all_saes


def test_each_trained_sae_is_compared_with_its_own_controls(tmp_path):
    scores = {("relu", None): SEEDS, ("relu", "pca"): [0.1], ("topk", None): [0.5, 0.51]}
    verdicts, claims = judge(sweep_of(tmp_path, scores))
    assert verdicts == [BETTER] and len(claims) == 1 and claims[0].startswith("model=relu explains")


def test_many_saes_are_counted_and_not_listed(tmp_path):
    scores = {}
    for number in range(MAX_SENTENCES + 1):
        scores |= {(f"sae{number}", None): SEEDS, (f"sae{number}", "pca"): [0.1 if number else 0.9]}
    _, claims = judge(sweep_of(tmp_path, scores))
    assert claims == [
        "EV of 5 trained SAEs, each beside its best control: 4 better, 1 worse."
    ]  # fmt: skip


def test_stable_features_are_told_with_controls_and_without(tmp_path):
    runs = sweep_of(tmp_path / "1", {("topk", None): SEEDS, ("topk", "pca"): SEEDS})
    runs = [run._replace(stable=x) for run, x in zip(runs, [0.5, 0.6, 0.55, 0, 0, 0], strict=True)]
    assert judge(runs)[1][-1] == (
        "topk repeats 55.0% ± 5.0% of its features under another seed at L0 32.0; its best "
        "control, pca, 0.0% ± 0.0% at L0 32.0: learning features instead of taking principal "
        "components is worth 55.0 points."
    )
    assert judge(runs[:3])[1] == ["topk repeats 55.0% ± 5.0% of its features under another seed."]


def test_shares_of_stable_features_share_seeds_which_their_noise_allows_for(tmp_path):
    """Pairs repeat 0.5, 0.6 and 0.7. Leaving out one seed leaves one pair, and the jackknife's
    variance of the mean is (3 - 1) / 3 (0.1^2 + 0 + 0.1^2) = 0.2^2 / 3."""
    runs = sweep_of(tmp_path, {("topk", None): SEEDS, ("topk", "frozen_decoder"): SEEDS})
    shares = [0.55, 0.6, 0.65, 0.0, 0.0, 0.0]
    runs = [run._replace(stable=x) for run, x in zip(runs, shares, strict=True)]
    means = MeansTable(SweepTable(runs))
    assert means.estimate("stable").spread == pytest.approx([0.2, 0.0])
    assert means.format_cell(0, "stable") == "60.0% ± 5.0%"
    two = MeansTable(SweepTable([*runs[:2], *runs[3:5]]))
    verdicts = {c.metric: c.verdict for c in compare_with_controls(two)}
    assert verdicts["stable"] == UNKNOWN and verdicts["explained_variance"] == TIED


def test_the_page_shows_claims_and_comparisons_first(tmp_path, capsys):
    write_report(tmp_path, sweep_of(tmp_path, {("topk", None): SEEDS, ("topk", "pca"): [0.5]}))
    page, out = (tmp_path / PAGE).read_text("utf8"), capsys.readouterr().out
    claim = "its best control, pca, 0.5000"
    assert claim in page and claim in " ".join(out.split())
    assert (
        page.index(claim) < page.index("Sparsity and") < page.index("Trained SAEs and their contr")
    )
    assert "+0.2200" in page and out.index("its best") < out.index("sweep, on held-out")

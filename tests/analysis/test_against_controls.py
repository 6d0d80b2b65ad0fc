"""An SAE beside its controls: the same text and scores, and sentences that fit the numbers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from subjects import make_subject, place
from tiny_run import tiny_job, write_text

from sae_lightning.analysis import collect as collect_module
from sae_lightning.analysis.against_controls import (
    ControlReducers,
    Score,
    exceeds_noise,
    make_control_section,
    pick_scores,
    score_features,
)
from sae_lightning.analysis.evaluate import EvaluateTask
from sae_lightning.analysis.open_controls import open_controls
from sae_lightning.analysis.overview import OverviewTask
from sae_lightning.analysis.subject import open_subject
from sae_lightning.analysis.survey.survey import survey
from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Kind, Site, SitePair
from sae_lightning.runs import passes
from sae_lightning.runs.jobs import read_job
from sae_lightning.sae.controls import Control


def test_a_control_that_is_the_sae_itself_has_its_scores_and_no_claim_holds(subject, words):
    beside = ControlReducers(subject, subject.sae)
    found = survey(subject, words(9000), tokens=8000, controls=[(subject.sae, beside.reducers)])
    scores = beside.result()
    own = score_features(found.features.token_sets.score, [])
    assert own["token_score"] == scores["token_score"]
    base = {"l0": Score(2.0), "explained_variance": Score(0.9)}
    section = make_control_section(base | scores, {"frozen_decoder": base | scores})
    assert "no better than those of frozen_decoder" in section.lead
    assert " better. " not in section.lead
    assert section.table.header == ["", "this SAE", "frozen_decoder"]
    assert all(cells[1] == cells[2] for cells in section.table.rows)


def test_the_llm_reads_the_text_once_for_an_sae_and_its_controls(subject, words, monkeypatch):
    read, capture = [], collect_module.capture
    monkeypatch.setattr(
        collect_module, "capture", lambda *args: read.append(len(args[1])) or capture(*args)
    )
    other = make_subject(subject.llm).sae
    beside = ControlReducers(subject, other)
    found = survey(subject, words(9000), tokens=3000, controls=[(other, beside.reducers)])
    assert sum(read) == -(-3000 // 11)
    alone = survey(place(subject.llm, other, subject.sites), words(9000), tokens=3000)
    assert (
        beside.result()["token_score"]
        == score_features(alone.features.token_sets.score, [])["token_score"]
    )
    again = survey(subject, words(9000), tokens=3000)
    assert torch.equal(again.sample.strengths, found.sample.strengths)


def test_a_difference_is_one_if_it_exceeds_its_noise():
    """Of 4 pairs with gaps 1, 1, 1, 2: mean 1.25, standard error 0.5 / sqrt(4) = 0.25, 3.18 of
    which are 0.8. Unpaired, the spread of each counts: about 13 / sqrt(4)."""
    a, b = [1.0, 11.0, 21.0, 32.0], [0.0, 10.0, 20.0, 30.0]
    assert exceeds_noise(a, b, paired=True)
    assert not exceeds_noise(a, b, paired=False)
    assert not exceeds_noise(b, a, paired=True)
    assert not exceeds_noise([1.0, 2.0, 3.0], [0.0, 2.0, 3.0], paired=True)  # 1/3, error 1/3
    assert not exceeds_noise([5.0], [1.0], paired=False), "nothing is known of its noise"


def test_the_sentences_are_chosen_by_the_numbers():
    base = {"l0": Score(8.0), "explained_variance": Score(0.9)}
    high, low = [0.8, 0.81, 0.82], [0.5, 0.51, 0.52]
    own = base | {"token_score": Score(0.81, high), "concepts": Score(0.51, low)}
    control = base | {"token_score": Score(0.51, low), "concepts": Score(0.51, low)}
    lead = make_control_section(own, {"pca": control}).lead
    assert lead == (
        "This SAE's features detect concepts (0.51 against 0.51) no better than those of pca. They "
        "match token sets (0.81 against 0.51) better. It explains 90.0% of the variance at an L0 "
        "of 8.0, pca 90.0% at an L0 of 8.0."
    )
    sparser = control | {"concepts": Score(0.2, [0.2, 0.21, 0.19]), "l0": Score(4.0)}
    lead = make_control_section(own, {"pca": sparser}).lead
    assert lead.startswith(
        "This SAE's features match token sets (0.81 against 0.51) and detect concepts (0.51 "
        "against 0.20) better than those of pca. It explains"
    )
    assert "they are not equally sparse" in lead
    more = control | {"l0": Score(8.9), "explained_variance": Score(0.99)}  # 11 % denser
    both = make_control_section(own, {"pca": sparser, "more": more, "frozen_decoder": control})
    assert both.lead.endswith("frozen_decoder 90.0% at an L0 of 8.0."), "the best at the same L0"
    assert "(0.51 against 0.51) no better than those of the best control" in both.lead
    assert both.numbers["pca"] == "directions are principal components"


def test_a_control_whose_score_is_not_a_number_is_not_the_best():
    own = pick_scores({"l0": 8.0, "explained_variance": 0.9})
    broken = pick_scores({"l0": 8.0, "explained_variance": math.nan})
    section = make_control_section(own, {"pca": broken, "frozen_decoder": own})
    assert section.lead.endswith(" L0 of 8.0, frozen_decoder 90.0% at an L0 of 8.0.")
    assert section.table.rows[1] == ["EV", "0.900", "", "0.900"]
    assert make_control_section(own, {"pca": broken}).lead == (
        "The explained variance is not a number, so it cannot be compared."
    )


@pytest.fixture(scope="module")
def sweep(tiny_folder, tmp_path_factory):
    """An SAE and two of its controls, trained on one pass."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text").mkdir()
    text, llm = write_text(folder / "text"), tiny_folder("llama")
    jobs = [tiny_job(llm, text, folder / "trained")]
    for kind in (Control.pca, Control.frozen_decoder):
        model = replace(jobs[0].config.model, control=kind)
        jobs.append(tiny_job(llm, text, folder / kind.name, model=model))
    passes.train_jobs(jobs)
    return folder


def open_trained(sweep, name="trained"):
    config = read_job(sweep / name).config
    settings = {"llm": config.llm, "data": config.data, "layer": config.layer, "seed": 0}
    return open_subject(str(sweep / name), settings), settings


@pytest.mark.slow
def test_the_controls_of_the_sweep_are_opened_in_their_order_or_by_name(sweep):
    subject, _ = open_trained(sweep)
    assert [*open_controls(subject, None, limit=1)] == ["frozen_decoder"]
    assert [*open_controls(subject, "all", limit=1)] == ["frozen_decoder", "pca"]
    assert [*open_controls(subject, "pca", limit=1)] == ["pca"]
    (by_hand,) = open_controls(subject, str(sweep / "pca"), limit=1).items()
    assert by_hand[0] == "pca"
    assert not torch.equal(by_hand[1].W_dec, subject.sae.W_dec)
    with pytest.raises(UserError, match=r"control=frozen_encoder: .*has frozen_decoder, pca\)"):
        open_controls(subject, "frozen_encoder", limit=1)
    control, _ = open_trained(sweep, "pca")
    assert open_controls(control, None, limit=1) == {}, "a control has none"
    block_0 = Site(0, Kind.resid)
    moved = replace(subject, sites=SitePair(block_0, block_0))
    with pytest.raises(UserError, match="give one of the same site"):
        open_controls(moved, str(sweep / "pca"), limit=1)


@pytest.mark.slow
def test_page_and_numbers_show_an_sae_beside_its_control(sweep, capsys):
    _, settings = open_trained(sweep)
    given = settings | {"run": str(sweep / "trained")}
    OverviewTask(task="overview", tokens=1500, **given).execute([])
    said = capsys.readouterr().out
    assert "Comparison with controls" in said and "than those of frozen_decoder" in said
    results = sweep / "trained" / "analysis"
    page = (results / "index.html").read_text("utf8")
    assert "Comparison with controls" in page and "decoder directions stay random" in page
    numbers = json.loads((results / "overview.json").read_text())
    assert [*numbers["evaluate"]["controls"]] == ["frozen_decoder"]
    EvaluateTask(task="evaluate", **given).execute([])
    numbers = json.loads((results / "evaluate.json").read_text())
    assert [*numbers["controls"]] == ["frozen_decoder", "pca"]
    for control in numbers["controls"].values():
        assert {"kl", "ce_spliced", "error_share"} <= control.keys()
        assert control["ce_clean"] == numbers["ce_clean"]
    OverviewTask(task="overview", tokens=1500, **given | {"run": str(sweep / "pca")}).execute([])
    assert "This SAE is a control itself, pca" in capsys.readouterr().out

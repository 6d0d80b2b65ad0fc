"""The scorecard of a saved SAE: closed forms, on text and on synthetic concepts."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Generator

from sae_lightning.analysis.evaluate import evaluate, list_numbers, make_scorecard_section
from sae_lightning.llm import splice
from sae_lightning.llm.sites import Kind, Site, SitePair
from sae_lightning.llm.splice import SpliceScores
from sae_lightning.sae import ARCHITECTURES, SAE, SAEConfig, build_sae
from sae_lightning.scoring.scorecard import score_saes
from sae_lightning.stream.concepts import make_concept_world
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.synthetic import HeldOutConcepts
from sae_lightning.stream.tokens import open_tokens

SITES = SitePair(Site(1, Kind.resid), Site(1, Kind.resid))
WIDTH = 24


def both_signs(width: int, scale: float = 1.0):
    """x_hat = scale x: one feature for each sign of each dimension, decoder norms 2 and 2."""
    sae = build_sae(SAEConfig(features=2 * width, start_bias=0.0), width, width)
    eye = torch.eye(width)
    directions = torch.cat([eye, -eye])
    weights = {
        "W_enc": scale / 2 * directions.T,
        "b_enc": torch.zeros(2 * width),
        "W_dec": 2 * directions,
        "b_dec": torch.zeros(width),
    }
    sae.load_weights(weights)
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def held_out(tiny):
    from datasets import Dataset

    text = Dataset.from_dict({"text": ["seven wizards mix a potion over the lazy dog " * 20]})
    llm = tiny("llama")
    tokens = open_tokens(SplitDocuments(text, text), llm.tokenizer, context=16, seed=0)
    return HeldOut(llm, tokens.held_out, [SITES.source], tokens=200, loss_tokens=100, batch=4)


def test_the_identity_loses_nothing(held_out):
    found = evaluate(both_signs(WIDTH), held_out, SITES).to_dict()
    assert found["l0"] == WIDTH  # of each pair, one
    assert found["explained_variance"] == pytest.approx(1)
    assert (found["mse"], found["kl"]) == pytest.approx((0, 0), abs=1e-6)
    assert found["ce_recovered"] == pytest.approx(1, abs=1e-5)
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], abs=1e-5)
    for name in ("cosine", "cosine_centred", "norm_ratio", "gamma", "gamma_centred"):
        assert found[name] == pytest.approx(1), name
    assert (found["decoder_norm_mean"], found["decoder_norm_max"]) == (2, 2)


def predict_mean(held_out) -> SAE:
    """x_hat = mean of x, whatever x is."""
    sae = both_signs(WIDTH)
    sae.load_weights({**sae.weights(), "W_dec": torch.zeros(2 * WIDTH, WIDTH)})
    sae.b_dec[:] = held_out.activations(SITES.source).float().mean(dim=0)
    return sae


def test_what_a_perfect_sae_leaves_out_is_worth_nothing_and_what_the_mean_leaves_out_all(held_out):
    perfect = evaluate(both_signs(WIDTH), held_out, SITES).to_dict()
    assert perfect["ce_error"] == pytest.approx(perfect["ce_mean"], abs=1e-5)
    assert (perfect["features_share"], perfect["error_share"]) == pytest.approx((1, 0), abs=1e-4)
    mean = evaluate(predict_mean(held_out), held_out, SITES).to_dict()
    assert mean["ce_error"] == pytest.approx(mean["ce_clean"], abs=1e-5)
    assert (mean["features_share"], mean["error_share"]) == pytest.approx((0, 1), abs=1e-4)


def test_controls_are_scored_beside_an_sae_as_they_are_alone_on_one_run_of_the_clean_llm(
    held_out, monkeypatch
):
    controls = {"frozen_decoder": both_signs(WIDTH, 0.5), "pca": predict_mean(held_out)}
    alone = [evaluate(sae, held_out, SITES) for sae in (both_signs(WIDTH), *controls.values())]
    runs, run_body = [], splice.run_body
    monkeypatch.setattr(splice, "run_body", lambda *args: runs.append(1) or run_body(*args))
    result = evaluate(both_signs(WIDTH), held_out, SITES, controls)
    batches = -(-len(held_out._loss_indices) // held_out.batch)
    assert len(runs) == batches * (1 + 3 * 2)  # clean; of each SAE, its features and its error
    cards = [result.card, *result.controls.values()]
    for card, single in zip(cards, alone, strict=True):
        assert list_numbers(card) == pytest.approx(list_numbers(single.card), nan_ok=True)
    assert result.to_dict()["controls"].keys() == controls.keys()


def test_features_that_are_too_weak_are_found_as_shrinkage(held_out):
    sae = both_signs(WIDTH, scale=0.75)
    found = evaluate(sae, held_out, SITES).to_dict()
    x = held_out.activations(SITES.source)
    assert (found["norm_ratio"], found["gamma"]) == pytest.approx((0.75, 0.75))
    assert found["relative_mse"] == pytest.approx(1 / 16)
    assert found["mse"] == pytest.approx(x.square().mean().item() / 16, rel=1e-5)
    assert found["cosine"] == pytest.approx(1)


def test_of_many_features_fewer_tokens_are_looked_at_at_a_time(held_out, monkeypatch):
    sae, most = both_signs(WIDTH, scale=0.75), []
    whole = evaluate(sae, held_out, SITES).card.scalars()
    monkeypatch.setattr("sae_lightning.scoring.scorecard.MAX_ACTIVATIONS_AT_ONCE", 7 * 2 * WIDTH)
    sae.register_forward_hook(lambda _, __, output: most.append(len(output.features)))
    found = evaluate(sae, held_out, SITES).card.scalars()
    assert found == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert max(most) == 7


def test_training_is_spared_what_only_the_evaluation_asks_for(held_out):
    sae = both_signs(WIDTH, scale=0.75)
    (asked,) = score_saes([sae], [sae.W_dec], held_out, *SITES, fidelity=True)
    (spared,) = score_saes([sae], [sae.W_dec], held_out, *SITES)
    assert spared.fidelity is None and asked.fidelity.gamma == pytest.approx(0.75)
    more = {"ce_error": asked.scores.ce_error}
    assert spared.scalars() | more == pytest.approx(asked.scalars())


def test_without_the_llms_loss_the_page_speaks_of_the_rest(held_out, tiny):
    packing = SimpleNamespace(window_size=15)
    tokens = SimpleNamespace(pick_sequences=lambda n: held_out.tokens, packing=packing)
    quick = HeldOut(tiny("llama"), tokens, [SITES.source], tokens=200, loss_tokens=0, batch=4)
    sae = both_signs(WIDTH, scale=0.75)
    result, whole = (evaluate(sae, each, SITES).to_dict() for each in (quick, held_out))
    shares = {"features_share", "error_share"}
    assert whole.keys() - result.keys() == {*SpliceScores._fields} | shares
    assert all(result[name] == whole[name] for name in result)
    page = make_scorecard_section(evaluate(sae, quick, SITES))
    assert page.title == "Scorecard on held-out text"
    assert page.lead.endswith("of the activations' variance.")
    assert not {"CE recovered", "KL"} & {*page.numbers}
    assert len(page.figures) == 2


def test_a_loss_that_is_not_finite_is_no_number_of_nats_in_the_lead(held_out):
    result = evaluate(both_signs(WIDTH), held_out, SITES)
    nothing = SpliceScores(*[math.nan] * len(SpliceScores._fields))
    result = result._replace(card=result.card._replace(scores=nothing))
    assert make_scorecard_section(result).lead.endswith("of the activations' variance.")


def test_the_lead_speaks_of_a_share_only_where_zero_ablation_costs_something(held_out):
    result = evaluate(both_signs(WIDTH, scale=0.75), held_out, SITES)
    for zero, end in (
        (
            9.0,
            "(90.0% of what zero ablation costs is recovered). Of what mean ablation costs, the ",
        ),
        (2.9, "(zero ablation costs nothing). Of what mean ablation costs, the "),
    ):
        scores = SpliceScores(3.0, 3.6, zero, 7.0, 0.9, 0.1, 5.0)
        end += "features alone recover 85.0%, the error alone (what they leave out) 50.0%."
        shown = make_scorecard_section(result._replace(card=result.card._replace(scores=scores)))
        assert shown.lead.endswith(f"0.600 nats higher {end}")


def test_what_is_written_is_json_with_every_number_of_the_scorecard(held_out):
    result = evaluate(both_signs(WIDTH), held_out, SITES)
    found = json.loads(json.dumps(result.to_dict()))
    assert result.card.scalars().items() <= found.items()
    assert found["tokens"] == len(held_out.activations(SITES.source))
    assert sum(found["density"].values()) == 2 * WIDTH


def test_the_section_shows_the_numbers_and_three_figures(held_out):
    result = evaluate(both_signs(WIDTH, scale=0.75), held_out, SITES)
    shown = make_scorecard_section(result)
    assert shown.title == "Scorecard on held-out text"
    assert "24.0 active features of 48" in shown.lead
    assert "0.7500" in shown.numbers["shrinkage"]
    assert len(shown.figures) == 3
    for figure in shown.figures.values():
        json.dumps(json.loads(figure.to_json()), allow_nan=False)
    density, norms = [*shown.figures.values()][:2]
    assert sum(density.data[0].y) + (result.card.quality.density == 0).sum() == 2 * WIDTH
    assert sum(norms.data[0].y) == 2 * WIDTH


def test_silent_features_are_counted_in_the_caption(held_out):
    sae = both_signs(WIDTH)
    sae.b_enc[:5] = -1e6
    captions = [*make_scorecard_section(evaluate(sae, held_out, SITES)).figures]
    silent = 5 + int(
        (evaluate(both_signs(WIDTH), held_out, SITES).card.quality.density == 0)[5:].sum()
    )
    assert captions[0] == f"How often features fire ({silent} never do)"


def test_synthetic_concepts_are_scored_without_an_llm():
    world = make_concept_world(concepts=8, dim=8, l0=1.0, seed=0)
    held_out = HeldOutConcepts(world, seed=0, tokens=500, device="cpu")
    result = evaluate(both_signs(8), held_out, SITES)
    found = result.to_dict()
    assert found["explained_variance"] == pytest.approx(1)
    assert found["gamma"] == pytest.approx(1)
    assert "ce_clean" not in found
    assert math.isfinite(found["recovered"])
    assert make_scorecard_section(result).title == "Scorecard on held-out samples"
    assert len(make_scorecard_section(result).figures) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_a_scorecard(name, held_out):
    kind = ARCHITECTURES[name].config
    sparse = {"k": 4} if "k" in kind.__dataclass_fields__ else {}
    sae = build_sae(
        kind(name=name, features=40, **sparse), WIDTH, WIDTH, Generator().manual_seed(0)
    )
    shown = make_scorecard_section(evaluate(sae.requires_grad_(False), held_out, SITES))
    assert shown.numbers["L0"]

"""The claims of the theory, on SAEs and activations for which the answer is known."""

import json
import math

import pytest
import torch
from batches import pick_active
from subjects import make_subject, place
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from sae_lightning.analysis.collect import EncodedBatch, collect, excerpt
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.theory.claims import (
    DENSE_TOKENS,
    TheoryReducer,
    measure_activity,
    measure_claims,
    summarise_distribution,
)
from sae_lightning.analysis.theory.dense import compare_dense
from sae_lightning.analysis.theory.detection import Detector
from sae_lightning.analysis.theory.one_concept import ConceptDetectors, compare_units
from sae_lightning.analysis.theory.overlap import compare_directions, count_cosines
from sae_lightning.analysis.theory.theory_sections import make_theory_sections
from sae_lightning.analysis.theory.token_concepts import CONCEPTS, tag_tokens
from sae_lightning.llm.sites import Kind, Site, SitePair
from sae_lightning.llm.vocabulary import find_special_ids, read_vocabulary
from sae_lightning.sae import ARCHITECTURES, build_sae
from sae_lightning.scoring.moments import Moments

WIDTH, FEATURES, CONTEXT = 24, 48, 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def subject_of(llm, name: str = "relu", **settings) -> Subject:
    kind = ARCHITECTURES[name].config
    sparse = {"k": 4} if "k" in kind.__dataclass_fields__ else {}
    settings = {"start_bias": 0.0, **sparse, **settings}
    sae = build_sae(kind(name=name, features=FEATURES, **settings), WIDTH, WIDTH)
    site = Site(1, Kind.resid)
    return place(llm, sae, SitePair(site, site))


def batch_of(
    subject: Subject, x: Tensor, tokens: Tensor | None = None, first: int = 0
) -> EncodedBatch:
    """A batch of activations [sequences, context, WIDTH]; position 0 is BOS."""
    tokens = torch.full(x.shape[:2], 5) if tokens is None else tokens
    keep = torch.ones(x.shape[:2], dtype=torch.bool)
    keep[:, 0] = False
    features = subject.sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1)
    features = features.masked_fill(~keep[..., None], 0)
    ids = torch.arange(first, first + len(x))
    return EncodedBatch(tokens, keep, x, x, pick_active(features), ids)


def theory_of(subject: Subject, x: Tensor, tokens: Tensor | None = None):
    """The theory of a subject on activations, given in uneven batches."""
    reducer, first = TheoryReducer(subject), 0
    for n in (3, len(x) - 3):
        part = slice(first, first + n)
        reducer.add(batch_of(subject, x[part], None if tokens is None else tokens[part], first))
        first += n
    return measure_claims(subject, reducer)


def lead(result, title: str) -> str:
    (found,) = [section.lead for section in make_theory_sections(result) if section.title == title]
    return found


DIRECTIONS = "Encoder against decoder directions"


def test_an_encoder_that_is_the_decoder_transposed_has_cosines_of_1(tiny):
    result = theory_of(subject_of(tiny("llama")), noise(20, CONTEXT, WIDTH))
    assert result.numbers["fired"] == FEATURES
    assert torch.allclose(result.agreement, torch.ones(FEATURES))
    assert result.numbers["agreement"]["chance"] == pytest.approx(24**-0.5)
    assert "written nearly in the direction in which it is read" in lead(result, DIRECTIONS)


def test_an_encoder_orthogonal_to_the_decoder_is_called_unrelated(tiny):
    subject = subject_of(tiny("llama"))
    half = WIDTH // 2
    subject.sae.W_enc[half:] = 0
    subject.sae.W_dec[:, :half] = 0
    result = theory_of(subject, noise(20, CONTEXT, WIDTH))
    assert result.agreement.abs().max() == 0
    assert "nothing to do with one another" in lead(result, DIRECTIONS)


def test_features_that_never_fire_say_nothing(tiny):
    subject = subject_of(tiny("llama"))
    subject.sae.b_enc[:10] = -1e6
    result = theory_of(subject, noise(20, CONTEXT, WIDTH))
    assert (result.numbers["fired"], len(result.agreement)) == (FEATURES - 10, FEATURES - 10)
    assert len(result.margin) == FEATURES - 10


def test_the_margin_is_taken_at_the_mean_in_deviations(tiny):
    # x has mean 3 and deviation 2 in dimension 0, which feature 0 reads twice over with b_enc = -9:
    # (2 x 3 - 9) / (2 x 2) = -0.75
    subject = subject_of(tiny("llama"))
    x = noise(400, CONTEXT, WIDTH)
    kept = x[:, 1:]
    x = (x - kept.mean((0, 1))) / kept.std((0, 1), correction=0)
    x[..., 0] = 2 * x[..., 0] + 3
    subject.sae.W_enc[0] = 0
    subject.sae.W_enc[:, 0] = 2 * one_hot(torch.tensor(0), WIDTH)
    subject.sae.b_enc[0] = -9
    result = theory_of(subject, x)
    assert result.margin[0].item() == pytest.approx(-0.75, abs=1e-4)
    # a standard normal exceeds 0.75 with probability 0.2266, what else fires is at 0: 1/2 each
    expected = 0.2266 + (FEATURES - 1) / 2
    assert result.numbers["biases"]["l0_if_normal"] == pytest.approx(expected, abs=0.01)
    assert result.numbers["activity"]["mean"] == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "batch_topk", "gated"])
def test_moving_all_activations_changes_raw_biases_and_no_margin(tiny, name):
    subject, x = subject_of(tiny("llama"), name), noise(30, CONTEXT, WIDTH)
    if name == "batch_topk":
        subject.sae.threshold.fill_(0.02)
    shift, one = 5 + noise(WIDTH, seed=1), torch.ones(())
    moved = subject_of(tiny("llama"), name)
    moved.sae.load_weights(subject.sae.fold(shift, one, shift, one))
    here, there = theory_of(subject, x), theory_of(moved, x + shift)
    assert torch.allclose(here.margin, there.margin, atol=1e-3)
    raw, moved_raw = (each.numbers["biases"]["raw_negative"] for each in (here, there))
    assert raw == 0 < moved_raw < 1


def test_a_threshold_counts_against_the_feature(tiny):
    subject = subject_of(tiny("llama"), "jumprelu", threshold=0.05)
    result = theory_of(subject, noise(50, CONTEXT, WIDTH))
    # b_enc = 0 and mean about 0; the encoder's columns have norm 0.1 and x has deviation 1
    assert result.margin.mean().item() == pytest.approx(-0.5, abs=0.05)
    assert "100.0% of features are below their threshold" in lead(result, "Encoder biases")
    assert "standard deviations below it" in lead(result, "Encoder biases")


def test_features_that_are_on_by_default_are_called_so(tiny):
    subject = subject_of(tiny("llama"))
    subject.sae.b_enc.fill_(1.0)
    assert "on by default" in lead(theory_of(subject, noise(20, CONTEXT, WIDTH)), "Encoder biases")


def test_orthogonal_directions_have_no_cosine_and_equal_ones_have_1():
    eye = torch.eye(WIDTH)
    alone = count_cosines(eye, torch.arange(WIDTH))
    assert (alone.find_share_above(0.001), alone.find_quantile(0.99)) == (0, 0.001)
    assert alone.nearest.max() == 0
    assert alone.counts.sum() == WIDTH * (WIDTH - 1)  # none with itself
    twice = count_cosines(torch.cat([eye, 3 * eye]), torch.arange(WIDTH))
    assert (twice.nearest == 1).all()
    assert twice.find_share_above(0.3) == pytest.approx(1 / (2 * WIDTH - 1))
    opposite = count_cosines(torch.cat([eye, -eye]), torch.arange(WIDTH))
    assert opposite.find_share_above(0.999) == pytest.approx(1 / (2 * WIDTH - 1))
    assert opposite.nearest.max() == 0


def test_random_directions_are_as_theory_has_them():
    # nearly normal with deviation 1 / sqrt(d): the median is at 0.674, 99 % below 2.576 of them
    found = compare_directions(noise(600, 400, seed=5), torch.eye(400))
    for each in found.values():
        assert each.find_quantile(0.5) == pytest.approx(0.674 / 20, abs=0.002)
        assert each.find_quantile(0.99) == pytest.approx(2.576 / 20, abs=0.003)
    stretched = torch.diag(torch.tensor([5.0] + [0.1] * 399))
    assert compare_directions(noise(600, 400), stretched)["like_data"].find_quantile(0.5) > 0.5


def test_features_that_fire_together_spread_more_than_independent_ones():
    # 4 features on half of 100 tokens, always together: 0 or 4, deviation 2; independent: 1
    together = measure_activity(torch.tensor([50, 0, 0, 0, 50]), torch.full((4,), 0.5).double())
    assert (together["mean"], together["deviation"]) == (2, 2)
    assert together["deviation_if_independent"] == 1
    assert [together[share] for share in ("5%", "50%", "75%", "100%")] == [0, 0, 4, 4]


def test_the_least_and_the_greatest_number_of_active_features_are_those_that_occur():
    counts = torch.tensor([0, 0, 5, 90, 5, 0])
    activity = measure_activity(counts, torch.full((5,), 0.6).double())
    assert [activity[share] for share in ("0%", "5%", "50%", "100%")] == [2, 2, 3, 4]


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ([50, 0, 0, 0, 50], "2.0 times what features that fire independently would give"),
        ([6, 25, 38, 25, 6], "about what features that fire independently would give"),
        ([0, 0, 100, 0, 0], "less than features that fire independently would give"),
    ],
)
def test_the_spread_of_active_features_is_called_what_it_is(tiny, counts, verdict):
    result = theory_of(subject_of(tiny("llama")), noise(20, CONTEXT, WIDTH))
    result.numbers["activity"] = measure_activity(
        torch.tensor(counts), torch.full((4,), 0.5).double()
    )
    assert verdict in lead(result, "Features per token")


@pytest.mark.parametrize("fired", [0, 1])
def test_where_no_two_features_fire_nothing_is_said_of_directions_and_biases(tiny, fired):
    subject = subject_of(tiny("llama"))
    subject.sae.b_enc[fired:] = -1e6
    result = theory_of(subject, noise(20, CONTEXT, WIDTH))
    assert result.numbers["fired"] == fired
    titles = [section.title for section in make_theory_sections(result)]
    assert titles == ["Features per token", "One feature, one concept", "Dense autoencoders"]
    assert "nan" not in "".join(section.lead for section in make_theory_sections(result))
    json.dumps(result.numbers, allow_nan=False)


def test_features_that_the_sae_is_worth_are_rounded_to_as_many_as_it_takes(tiny):
    result = theory_of(subject_of(tiny("llama")), noise(20, CONTEXT, WIDTH))
    result.numbers["dense"]["worth"] = 5.1
    assert "it takes 6 dense features" in lead(result, "Dense autoencoders")
    result.numbers["dense"]["worth"] = float(WIDTH)
    assert "no fewer dense features than the site has dimensions" in lead(
        result, "Dense autoencoders"
    )


def test_active_features_are_counted_and_the_error_is_that_of_the_sae(tiny):
    subject, x = subject_of(tiny("llama")), noise(20, CONTEXT, WIDTH)
    result = theory_of(subject, x)
    kept = x[:, 1:].flatten(0, 1)
    output = subject.sae(kept)
    number = (output.features > 0).sum(dim=1)
    assert torch.equal(result.l0_counts, torch.bincount(number, minlength=FEATURES + 1))
    total = (kept - kept.mean(dim=0)).square().sum()
    explained = 1 - (kept - output.reconstruction).square().sum() / total
    assert result.numbers["dense"]["explained"] == pytest.approx(explained.item(), abs=1e-5)
    assert result.numbers["dense"]["l0"] == pytest.approx(number.float().mean().item())


def test_a_planted_feature_is_found_as_the_one_of_its_concept(tiny):
    llm = tiny("llama")
    subject = subject_of(llm)
    names = read_vocabulary(llm)
    animals = torch.tensor([names.index(" dog"), names.index(" fox")])
    others = torch.tensor([names.index(" mix"), names.index(" lazy"), names.index(" wizards")])
    random = Generator().manual_seed(0)
    which = torch.randint(0, 5, (60, CONTEXT), generator=random)
    tokens = torch.cat([animals, others])[which]
    x = noise(60, CONTEXT, WIDTH)
    x[..., 3] = 10.0 * (which < 2)
    subject.sae.W_enc[3] = 0
    subject.sae.W_enc[:, 7] = one_hot(torch.tensor(3), WIDTH).float()
    subject.sae.b_enc[7] = -5
    result = theory_of(subject, x, tokens)
    (found,) = [one for one in result.detectors if one.concept == "animals"]
    assert (found.feature.unit, found.feature.f1, found.feature.auroc) == (7, 1, 1)
    assert (found.neuron.unit, found.neuron.below, found.neuron.f1) == (3, False, 1)
    assert found.share == pytest.approx(0.4, abs=0.05)
    assert "no better than" in lead(result, "One feature, one concept")  # both are perfect


ANIMALS = (" dog", " fox")
OTHERS = (" mix", " lazy", " wizards")


def animals_in(llm, share: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [sequences, CONTEXT] of which this share [sequences] are animals; and which."""
    names = read_vocabulary(llm)
    ids = torch.tensor([names.index(word) for word in (*ANIMALS, *OTHERS)])
    random = Generator().manual_seed(0)
    is_animal = torch.rand(len(share), CONTEXT, generator=random) < share[:, None]
    which = torch.randint(0, 6, is_animal.shape, generator=random)
    return ids[torch.where(is_animal, which % 2, 2 + which % 3)], is_animal


def test_halves_are_of_sequences_and_a_concept_of_one_half_is_not_scored(tiny):
    subject = subject_of(tiny("llama"))
    even = torch.arange(60) % 2 == 0
    for odd_share in (0.0, 0.2):
        tokens, is_animal = animals_in(subject.llm, torch.where(even, 0.4, odd_share))
        result = theory_of(subject, noise(60, CONTEXT, WIDTH), tokens)
        found = [one for one in result.detectors if one.concept == "animals"]
        assert len(found) == (odd_share > 0)
    share = is_animal[1::2, 1:].double().mean().item()  # of the half that is scored
    assert found[0].share == pytest.approx(share)


@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_fair_choice_is_among_as_many_features_as_neurons_have_directions(tiny, is_drawn):
    config = ARCHITECTURES["relu"].config(features=200, start_bias=0.0)
    sae = build_sae(config, WIDTH, WIDTH).requires_grad_(False)
    lot = torch.randperm(200, generator=Generator().manual_seed(0))[: 2 * WIDTH].tolist()
    planted = lot[-1] if is_drawn else min({*range(200)} - {*lot})
    sae.W_enc[:, planted] = one_hot(torch.tensor(3), WIDTH).float()
    sae.b_enc[planted] = -5
    subject = subject_of(tiny("llama"))
    subject.sae = sae
    tokens, is_animal = animals_in(subject.llm, torch.full((60,), 0.4))
    x = noise(60, CONTEXT, WIDTH)
    x[..., 3] = 10.0 * is_animal
    result = theory_of(subject, x, tokens)
    (found,) = [one for one in result.detectors if one.concept == "animals"]
    assert found.feature.unit == planted
    assert found.subset_feature.unit in lot
    assert (found.subset_feature.unit == planted) == is_drawn


@pytest.mark.parametrize(
    ("cosine", "verdict"),
    [
        (0.95, "written nearly in the direction"),
        (0.7, "alike but not the same"),
        (0.3, "related but mostly different"),
        (0.1, "nothing to do with one another"),
        (-0.7, "nothing to do with one another"),
    ],
)
def test_directions_are_called_what_their_cosine_is(tiny, cosine, verdict):
    result = theory_of(subject_of(tiny("llama")), noise(20, CONTEXT, WIDTH))
    result.numbers["agreement"] = summarise_distribution(torch.full((FEATURES,), cosine)) | {
        "chance": 0.05
    }
    assert verdict in lead(result, DIRECTIONS)


@pytest.mark.parametrize(
    ("common", "verdict"), [(0.0, "as nearly orthogonal as random"), (3.0, "times as alike")]
)
def test_rows_that_share_a_direction_are_not_called_orthogonal(tiny, common, verdict):
    result = theory_of(subject_of(tiny("llama")), noise(20, CONTEXT, WIDTH))
    rows = noise(600, WIDTH, seed=1) + common * one_hot(torch.tensor(0), WIDTH)
    found = compare_directions(rows, torch.eye(WIDTH))
    result.numbers["overlap"] |= {name: each.scalars() for name, each in found.items()}
    assert verdict in lead(result, "Nearly orthogonal directions")


def test_special_tokens_hold_no_word_and_a_sentence_ends_before_them(tiny):
    subject = subject_of(tiny("llama"))
    vocabulary = TheoryReducer(subject).vocabulary
    for special in find_special_ids(subject.llm.tokenizer):
        column = list(CONCEPTS).index("ends of sentences")
        assert tag_tokens([" dog", ".", vocabulary[special], " fox"])[:, column].tolist() == [
            0,
            1,
            0,
            0,
        ]


def test_a_text_without_the_concepts_says_so(tiny):
    result = theory_of(subject_of(tiny("llama")), noise(20, CONTEXT, WIDTH))
    assert result.detectors == []
    assert lead(result, "One feature, one concept").startswith("No concept")
    assert result.numbers["detection"]["concepts"] == 0


def test_the_dense_curve_follows_from_the_covariance():
    # variances 4, 3, 2, 1 along rotated axes: 4/10, 7/10 and 9/10 with 1, 2 and 3 features
    axes, _ = torch.linalg.qr(noise(4, 4).double())
    variances = torch.tensor([4.0, 3.0, 2.0, 1.0]).double()
    # one point along each axis and direction has variance 1/4
    signs = 2 * torch.eye(4).double()
    moments = Moments()
    moments.add(torch.cat([signs, -signs]) @ torch.diag(variances.sqrt()) @ axes + 100)
    found, directions = moments.find_principal_directions()
    assert torch.allclose(found, variances)
    assert torch.allclose((directions @ axes.T).abs(), torch.eye(4).double(), atol=1e-7)
    dense = compare_dense(found, noise(200, 4), l0=1.5, mse=2.0)
    assert dense["curve"] == pytest.approx([0, 0.4, 0.7, 0.9, 1])
    assert dense["explained"] == pytest.approx(0.8)
    assert dense["worth"] == pytest.approx(2.5)  # half way from 0.7 to 0.9
    assert dense["at_l0"] == pytest.approx(0.55)  # half way from 0.4 to 0.7


def test_networks_attain_the_bound_and_none_with_fewer_features_than_dimensions_is_perfect():
    x = noise(500, 10) @ noise(10, 10, seed=1) + 30
    moments = Moments()
    moments.add(x)
    variances, _ = moments.find_principal_directions()
    dense = compare_dense(variances, x, l0=3.0, mse=0.0)
    assert [check["features"] for check in dense["checks"]] == [5, 9, 10]
    for check in dense["checks"]:
        assert check["measured"] == pytest.approx(check["expected"], abs=1e-12)
    half, short, full = (check["measured"] for check in dense["checks"])
    assert half < short < 1 - 1e-6
    assert full == pytest.approx(1, abs=1e-12)
    assert dense["worth"] == pytest.approx(10)  # a perfect SAE is worth all of them


@pytest.mark.parametrize("error", [20.0, 0.0])
def test_an_sae_that_explains_nothing_is_worth_no_feature_and_a_perfect_one_all(error):
    dense = compare_dense(torch.tensor([6.0, 4.0]).double(), noise(50, 2), 1.0, error)
    assert dense["worth"] == (0 if error else 2)


def test_moments_do_not_depend_on_the_cutting_or_on_a_far_mean():
    x = noise(300, 5).double() + 1e4
    moments = Moments()
    for part in x.split(70):
        moments.add(part)
    assert torch.allclose(moments.mean, x.mean(dim=0))
    assert torch.allclose(moments.covariance, x.T.cov(correction=0), rtol=1e-9, atol=1e-12)


def test_nothing_in_the_reducer_grows_with_the_text(tiny):
    subject = subject_of(tiny("llama"))
    reducer, sizes = TheoryReducer(subject), []
    for n in range(12):
        reducer.add(batch_of(subject, noise(16, CONTEXT, WIDTH, seed=n), first=16 * n))
        parts = reducer.source, reducer.feature_counts, reducer.neuron_counts, reducer
        tensors = [v for part in parts for v in vars(part).values() if isinstance(v, Tensor)]
        sizes.append(sum(tensor.numel() for tensor in tensors))
    assert sizes[0] < sizes[8]  # the sample fills up
    assert len(set(sizes[8:])) == 1
    assert len(reducer.sample) == DENSE_TOKENS


def words_of(tiny, words, name: str = "relu", **sites):
    subject = make_subject(tiny("llama"), **sites) if sites else subject_of(tiny("llama"), name)
    reducer = TheoryReducer(subject)
    batches, total = excerpt(words(5000), 1500, 16)
    collect(subject, batches, [reducer], total=total)
    return measure_claims(subject, reducer)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_tested_with_a_sentence_a_number_and_a_figure(tiny, words, name):
    result = words_of(tiny, words, name)
    found = make_theory_sections(result)
    assert len(found) == 6
    for section in found:
        assert section.lead.endswith(".") and "nan" not in section.lead
        assert section.numbers
        for figure in section.figures.values():
            json.dumps(json.loads(figure.to_json()), allow_nan=False)
    assert all(section.figures for section in found)
    numbers = json.loads(json.dumps(result.numbers, allow_nan=False))
    assert numbers["tokens"] >= 1500
    assert numbers["detection"]["concepts"] == len(result.detectors) > 0
    assert math.isclose(numbers["dense"]["curve"][-1], 1)
    each = numbers["detection"]["each"][0]
    assert [*each] == ["concept", "share", "feature", "neuron", "few"]
    assert [*each["few"]][-4:] == ["precision", "recall", "ranker", "auroc"]


def test_a_transcoder_is_spared_what_has_no_meaning_for_it(tiny, words):
    result = words_of(tiny, words, source=Kind.mlp_in, target=Kind.mlp)
    assert "agreement" not in result.numbers and "dense" not in result.numbers
    titles = [section.title for section in make_theory_sections(result)]
    assert DIRECTIONS not in titles and "Dense autoencoders" not in titles
    assert len(titles) == 4
    json.dumps(result.numbers, allow_nan=False)


@pytest.mark.parametrize(("auroc", "verdict"), [(0.9, "also rank"), (0.7, "do not rank")])
def test_a_measure_that_speaks_against_features_is_told_too(tiny, auroc, verdict):
    result = theory_of(subject_of(tiny("llama")), noise(20, CONTEXT, WIDTH))
    neuron = Detector(1, False, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 0.8)
    feature = neuron._replace(f1=0.9, auroc=auroc)
    found = ConceptDetectors("war", 0.1, feature, neuron, feature)
    result.numbers["detection"] = compare_units([found])
    result = result._replace(detectors=[found])
    said = lead(result, "One feature, one concept")
    assert f"{verdict} tokens better (AUROC {auroc:.2f} against 0.80)" in said


@pytest.mark.parametrize(
    ("f1", "verdict"), [(0.9, ", better than"), (0.5, "no better than"), (0.1, "no better than")]
)
def test_the_comparison_says_what_the_numbers_say(tiny, f1, verdict):
    result = theory_of(subject_of(tiny("llama")), noise(20, CONTEXT, WIDTH))
    neuron = Detector(1, False, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 0.5)
    feature = neuron._replace(f1=f1)
    found = ConceptDetectors("war", 0.1, feature, neuron, feature)
    result.numbers["detection"] = compare_units([found])
    result = result._replace(detectors=[found])
    said = lead(result, "One feature, one concept")
    assert verdict in said
    assert f"wins on {int(f1 > 0.5)} of 1 concepts" in said

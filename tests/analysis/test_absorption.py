"""Absorption and splitting, counted on dictionaries made by hand."""

import math
from string import ascii_lowercase

import pytest
import torch
from planted import save_planted, token
from subjects import place

from sae_lightning.analysis.benchmarks.absorption import (
    ConceptSamples,
    SampleParts,
    find_absorption,
    measure_absorption,
)
from sae_lightning.analysis.benchmarks.absorption_benchmark import average_results
from sae_lightning.analysis.benchmarks.absorption_sections import make_absorption_sections
from sae_lightning.analysis.benchmarks.first_letters import (
    EXAMPLES,
    _capture,
    find_words,
    make_prompt,
    read_first_letters,
)
from sae_lightning.errors import UserError
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.llm.load import Dtype, LLMConfig, load_llm
from sae_lightning.llm.sites import Kind, Site, SitePair
from sae_lightning.llm.vocabulary import read_vocabulary
from sae_lightning.sae import ARCHITECTURES, build_sae

PARENT, CHILD, OTHER = torch.eye(3)
N = 1500
PART = torch.arange(N) % 3
PARTS = SampleParts(PART == 0, PART == 1, PART == 2)


def make_samples(every: int) -> ConceptSamples:
    """Two of three samples have the parent, one in `every` of them the child; the others OTHER."""
    n = torch.arange(N) // 3
    has_parent, has_child = n % 3 < 2, (n % 3 < 2) & (n % every == 0)
    active = torch.stack([has_parent, has_child, ~has_parent], dim=1)
    x = active.float()
    return ConceptSamples(
        noun="letter",
        concepts=["parent"],
        names=[str(i) for i in range(N)],
        source=x,
        target=x,
        labels=has_parent[:, None],
        detected=has_parent[:, None],
        directions=PARENT[None],
        parts=PARTS,
        probe_f1=[1.0],
        children=has_child[:, None],
    )


def make_sae(reads: list[torch.Tensor], bias: list[float], writes: list[torch.Tensor]):
    """f = relu(x reads^T + bias), one feature for each direction."""
    config = ARCHITECTURES["relu"].config(features=len(reads))
    sae = build_sae(config, 3, 3).requires_grad_(False)
    sae.W_enc[:], sae.b_enc[:] = torch.stack(reads, dim=1), torch.tensor(bias)
    sae.W_dec[:], sae.b_dec[:] = torch.stack(writes), 0
    return sae


def measure(sae, every: int = 25):
    (result,) = measure_absorption(make_samples(every), sae)
    return result


def make_sections(results: dict):
    means = {name: average_results(each) for name, each in results.items()}
    return make_absorption_sections(make_samples(25), results, means)


PERFECT = make_sae([PARENT, CHILD, OTHER], [0, 0, 0], [PARENT, CHILD, OTHER])
# The parent's feature is off where the child is on, and the child's feature writes both.
ABSORBING = make_sae([PARENT - CHILD, CHILD, OTHER], [0, 0, 0], [PARENT, PARENT + CHILD, OTHER])


def test_a_perfect_dictionary_absorbs_nothing():
    result = measure(PERFECT)
    assert result.features == [0] and result.f1 == 1
    assert (result.silent, result.absorbed, result.fraction) == (0, 0, 0)


def test_absorption_is_the_share_of_samples_on_which_the_child_writes_the_parent():
    result, samples = measure(ABSORBING), make_samples(25)
    tested = PARTS.test & samples.labels[:, 0]
    share = samples.children[tested, 0].float().mean().item()
    assert share == pytest.approx(1 / 25, rel=0.1)
    assert result.features == [0]
    assert result.silent == result.absorbed == result.fraction == pytest.approx(share)
    assert {feature for _, feature in result.examples} == {1}
    assert (result.silent_with_child, result.silent_without) == (1, 0)


def test_a_feature_that_has_half_of_a_concept_is_a_split_and_absorbs_nothing():
    """With half of the samples the first feature has an F1 of 2/3, with the second 1."""
    result = measure(ABSORBING, every=2)
    assert sorted(result.features) == [0, 1] and result.f1 == 1
    assert (result.silent, result.absorbed) == (0, 0)


@pytest.mark.parametrize(
    "sae",
    [
        make_sae([PARENT, CHILD, OTHER], [-9, -9, -9], [PARENT, CHILD, OTHER]),  # silent
        make_sae([OTHER], [0], [OTHER]),  # fires where the parent is not
    ],
)
def test_a_dictionary_without_a_feature_for_the_letter_has_nothing_to_absorb(sae):
    result = measure(sae)
    assert result.features == result.examples == [] and result.f1 == 0
    assert all(map(math.isnan, [result.silent, result.absorbed, result.fraction]))
    section, letters = make_sections({"this SAE": [result], "pca": [measure(ABSORBING)]})
    assert section.lead.startswith("No letter has a feature of its own that could be absorbed. The")
    assert section.table.rows[0][4:6] == ["–", "–"] and section.table.rows[1][5] == "0.042"
    assert section.numbers["without own features"].startswith("1 of the letters")
    assert letters.lead == "No letter is absorbed." and letters.table.rows[0][2] == "none"
    (section, _) = make_sections({"this SAE": [measure(ABSORBING)], "pca": [result]})
    assert section.lead.endswith(" In controls no letter has a feature of its own.")


def test_means_leave_out_what_is_not_known_and_the_lead_says_so():
    """Where each sample has a child, nothing is known of those without."""
    always, without = measure(ABSORBING, every=1), measure(make_sae([OTHER], [0], [OTHER]))
    section, _ = make_sections({"this SAE": [always, measure(ABSORBING)]})
    assert section.lead.endswith("50% of the samples with a child, and on 0% of those without.")
    section, _ = make_sections({"this SAE": [always]})
    assert section.lead.endswith("samples with a child; there are none without.")
    means = average_results([measure(ABSORBING), without])
    assert means["f1"] == measure(ABSORBING).f1 / 2, "a letter without a feature is told by none"
    assert means["absorbed"] == measure(ABSORBING).absorbed


@pytest.mark.parametrize(
    ("strength", "absorbed", "fraction"),
    # the probe's projection is 1; other features must write 0.4 of it
    [(0.39, False, 0.0), (0.41, True, 1.0)],
)
def test_a_feature_absorbs_from_two_fifths_of_the_projection(strength, absorbed, fraction):
    features = torch.tensor([[0.0, strength]])
    W_dec = torch.stack([PARENT, PARENT + CHILD])
    rates = find_absorption(features, PARENT[None], PARENT, W_dec, [0])
    assert rates.absorbed.item() is absorbed
    assert rates.fraction.item() == fraction


def test_a_feature_that_shares_a_concept_absorbs_in_part():
    """Own 0.5 and other 0.6 of a projection of 1: the other takes 0.5, so half of what is written;
    the own feature fires, so that nothing is absorbed in full."""
    features, W_dec = torch.tensor([[0.5, 0.6]]), torch.stack([PARENT, PARENT + CHILD])
    rates = find_absorption(features, PARENT[None], PARENT, W_dec, [0])
    assert not rates.silent.item() and not rates.absorbed.item()
    assert rates.fraction.item() == pytest.approx(0.5)


def test_each_word_of_a_prompt_is_read_at_its_own_token(tmp_path):
    """Blocks that add nothing leave each token's embedding in the residual stream."""
    llm_folder, sae_folder = save_planted(tmp_path)
    llm = load_llm(LLMConfig(name=str(llm_folder), dtype=Dtype.float32, device="cpu"))
    site = Site(1, Kind.resid)
    subject = place(llm, load_sae(sae_folder), SitePair(site, site))
    ids = find_words(read_vocabulary(llm))
    words = list(ids)[: EXAMPLES + 2]
    answers = {letter: [token(" fox")] for letter in ascii_lowercase}
    prompts = [make_prompt(words, ids, answers, bos=0), make_prompt(words[1:], ids, answers, bos=0)]
    source, _ = _capture(subject, prompts)
    read = [ids[word] for word in [*words[EXAMPLES:], *words[1 + EXAMPLES :]]]
    assert torch.equal(source, llm.model.get_input_embeddings().weight[read])


def test_words_are_a_space_and_lower_case_letters():
    vocabulary = [" cat", " Cat", "cat", " a", " c3", " dog"]
    assert find_words(vocabulary) == {"cat": 0, "dog": 5}


def test_an_llm_with_too_few_words_is_refused(tmp_path):
    llm_folder, sae_folder = save_planted(tmp_path)
    llm = load_llm(LLMConfig(name=str(llm_folder), dtype=Dtype.float32, device="cpu"))
    site = Site(1, Kind.resid)
    subject = place(llm, load_sae(sae_folder), SitePair(site, site))
    subject.config.llm.name = str(llm_folder)
    with pytest.raises(UserError, match="too few for any letter"):
        read_first_letters(subject)

"""Evaluation on several ranks gives the numbers of one.

sae       features    sites       on which ranks
wide      13          1 -> 1      split
narrow    7           1 -> 1      split
    topk      10          1 -> 1      split, as jumprelu and batch_topk
first     8           0 -> 0      0
second    8           1 -> 2      1
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rank_processes import run_on_ranks
from small_text import byte_tokenizer
from tiny_llm import make_byte_llama

from sae_lightning.llm import splice
from sae_lightning.llm.load import LLM
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.ranks import ALONE, FeatureSplit, world
from sae_lightning.sae import ARCHITECTURES, Output, build_sae
from sae_lightning.scoring import duplicates, scorecard
from sae_lightning.stream import held_out as held_out_module
from sae_lightning.stream.concepts import make_concept_world
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.exchange import exchange_rows
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.synthetic import HeldOutConcepts
from sae_lightning.stream.tokens import open_tokens
from sae_lightning.training.callbacks.evaluation import evaluate_heads

pytestmark = pytest.mark.slow  # starts processes
WIDTH = 16
SITES = [Site(0, Kind.mlp), Site(0, Kind.resid), Site(1, Kind.resid)]
OWN = [SITES[:2], SITES[1:], []]  # the sites of each rank
DOCUMENTS = ["abcdefgh" * 5, "hgfedcba" * 4, "abba" * 9]
SIZES = [2, 3]
REAL = {"topk": {"k": 3}, "batch_topk": {"k": 3}, "jumprelu": {"threshold": 0.001}}
CALLS = Counter()


def load_tiny() -> LLM:
    model = make_byte_llama(WIDTH)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return LLM(model=model, tokenizer=byte_tokenizer(), name="tiny")


def open_held_out(llm: LLM, own, **settings) -> HeldOut:
    """13 sequences, 8 of them for the loss; in batches of 3 unless otherwise given."""
    data = Dataset.from_dict({"text": DOCUMENTS})
    tokens = open_tokens(SplitDocuments(data, data), llm.tokenizer, context=9, seed=0).held_out
    chosen = {"tokens": 1000, "loss_tokens": 70, "batch": 3} | settings
    return HeldOut(llm, tokens, SITES, own_sites=own, **chosen)


class Linear:
    """relu(x W_enc + b_enc) W_dec, with some decoder rows that are copies of others."""

    config = SimpleNamespace(start="")

    def __init__(self, features: int, ranks):
        self.split = split = FeatureSplit(features, ranks)
        generator = torch.Generator().manual_seed(features)
        W_enc, W_dec = torch.randn(2, features, WIDTH, generator=generator)
        W_dec[4] = 1.1 * W_dec[3] + 0.05  # on other ranks
        W_dec[6] = 0.9 * W_dec[0] + 0.05  # on the same rank
        self.W_enc, self.W_dec = split.slice(W_enc).T, split.slice(W_dec)
        self.b_enc = split.slice(torch.linspace(1, -9, features))

    def reconstruct(self, x):
        features = torch.relu(x @ self.W_enc + self.b_enc)
        return Output(self.split.ranks.sum(features @ self.W_dec / 9), features)

    def fold(self):
        b_dec = torch.zeros(WIDTH)
        return {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": b_dec}


class Log:
    """Keeps what is logged last."""

    def __init__(self):
        self.logged = {}

    def add_scalars(self, scalars, tokens):
        self.logged |= scalars

    def add_density(self, density, tokens):
        self.logged["density"] = density

    def add_histogram(self, name, values, tokens):
        self.logged[name] = values

    def flush(self):
        self.logged["flushed"] = True


def make_heads() -> list[SimpleNamespace]:
    ranks = world()
    placed = [("wide", 13, 1, 1, None), ("narrow", 7, 1, 1, None)]
    placed += [("first", 8, 0, 0, 0), ("second", 8, 1, 2, 1)]
    heads = []
    for name, features, source, target, rank in placed:
        if ranks.size > 1 and rank not in (None, ranks.rank):
            continue
        sae = Linear(features, ranks if rank is None else ALONE)
        head = {"name": name, "sae": sae, "source": SITES[source], "target": SITES[target]}
        head |= {"reconstruct_raw": sae.reconstruct, "fold_weights": sae.fold, "log": Log()}
        heads.append(SimpleNamespace(**head))
    return [make_real_head(name) for name in REAL] + heads


@torch.no_grad()
def make_real_head(name: str) -> SimpleNamespace:
    config = ARCHITECTURES[name].config(name=name, features=10, **REAL[name])
    sae = build_sae(config, WIDTH, WIDTH, ranks=world())
    zero, one = torch.zeros(WIDTH), torch.ones(())
    return SimpleNamespace(
        name=name,
        sae=sae,
        source=SITES[1],
        target=SITES[1],
        reconstruct_raw=torch.no_grad()(sae),
        fold_weights=lambda: sae.fold(zero, one, zero, one),
        log=Log(),
    )


def evaluate(held_out) -> dict:
    heads = make_heads()
    CALLS.clear()
    evaluate_heads(heads, held_out, 0)
    return {"LLM batches": CALLS["_sum_chunks"]} | {
        head.name: (head.held_out_metrics, head.density_counts, head.log.logged) for head in heads
    }


def exchange() -> list:
    """Exchange two rounds of rows that tell batch and site; the second has one batch only."""
    ranks, sites = world(), [set(own) for own in OWN]
    if ranks.size == 1:
        sites = [set(SITES)]
    results = []
    for counts in ([3, 0, 2][: ranks.size], [4]):
        rows = {
            site: torch.full((counts[ranks.rank], 5), 10 * ranks.rank + i, dtype=torch.bfloat16)
            for i, site in enumerate(SITES)
            if ranks.rank < len(counts)
        }
        like = torch.empty(0, 5, dtype=torch.bfloat16)
        results.append(exchange_rows(rows, counts, sites[: ranks.size], like))
    return results


def read(llm: LLM, own, **settings) -> tuple:
    """Kept tokens, activations of this rank, and baselines at two sites, asked for by rank 0."""
    held_out = open_held_out(llm, own, **settings)
    CALLS.clear()
    held_out.prepare(SITES[1:] if world().is_rank_zero else [])
    activations = {site: held_out.activations(site) for site in SITES if site in held_out.own_sites}
    return held_out.keep, activations, held_out._baselines, CALLS["capture"]


def run() -> dict:
    """All that is compared, on each rank, computed in several parts; calls of the LLM counted."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((held_out_module, "capture"), (splice, "_sum_chunks")):
            function = getattr(module, name)
            patch.setattr(
                module, name, lambda *args, f=function: CALLS.update([f.__name__]) or f(*args)
            )
        patch.setattr(splice, "LOGIT_ROWS", 8)
        patch.setattr(duplicates, "BLOCK_ROWS", 4)
        patch.setattr(scorecard, "MAX_TOKENS_AT_ONCE", 10)
        return compute_results()


def compute_results() -> dict:
    ranks, llm = world(), load_tiny()
    own = None if ranks.size == 1 else OWN[ranks.rank]
    results = {
        "exchange": exchange(),
        "whole": read(llm, own),
        "one batch": read(llm, own, batch=100),
        "max_norm": read(llm, own, max_norm=1.2),
    }
    own = None if ranks.size == 1 else OWN[ranks.rank] or SITES[1:2]
    concepts = HeldOutConcepts(
        make_concept_world(concepts=7, dim=WIDTH, l0=1), seed=0, tokens=300, device="cpu"
    )
    results |= {
        "text": evaluate(open_held_out(llm, own)),
        "no loss": evaluate(open_held_out(llm, own, loss_tokens=0)),
        "concepts": evaluate(concepts),
    }
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{number of ranks: [results of `run` by rank]}"""
    return run_on_ranks(run, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_rank_gets_the_rows_of_its_sites_from_every_batch(results, size):
    for rank, result in enumerate(results[size]):
        own = SITES if size == 1 else OWN[rank]
        for counts, batches in zip(([3, 0, 2][:size], [4]), result["exchange"], strict=True):
            assert len(batches) == len(counts)
            for batch, (rows, count) in enumerate(zip(batches, counts, strict=True)):
                assert list(rows) == own
                for site, x in rows.items():
                    expected = torch.full((count, 5), 10 * batch + SITES.index(site)).bfloat16()
                    assert torch.equal(x, expected), (rank, batch, site)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["whole", "one batch", "max_norm"])
def test_held_out_text_is_read_together_and_bit_equal(results, size, case):
    keep, activations, baselines, calls = results[1][0][case]
    assert len(baselines) == 2
    for rank, result in enumerate(results[size]):
        assert torch.equal(result[case][0], keep)
        assert list(result[case][1]) == OWN[rank]
        for site, x in result[case][1].items():
            assert torch.equal(x, activations[site])
        assert result[case][2] == baselines
    assert sum(result[case][3] for result in results[size]) == calls
    assert case == "one batch" or max(result[case][3] for result in results[size]) < calls


def test_large_norms_are_dropped_at_all_sites_wherever_they_are_read(results):
    kept = {case: results[1][0][case][0].sum() for case in ("whole", "max_norm")}
    assert 0 < kept["max_norm"] < kept["whole"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("data", ["text", "no loss", "concepts"])
def test_an_sae_on_one_rank_has_the_numbers_of_one_device_bit_for_bit(results, size, data):
    for rank, name in enumerate(["first", "second"]):
        assert repr(results[size][rank][data][name]) == repr(results[1][0][data][name])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("data", ["text", "no loss", "concepts"])
@pytest.mark.parametrize("name", ["wide", "narrow", *REAL])
def test_a_split_sae_has_the_numbers_of_one_device_on_every_rank(results, size, data, name):
    metrics, counts, logged = results[1][0][data][name]
    assert metrics["l0"] > 0
    assert name in REAL or (0 < metrics["unfired"] < 1 and metrics["duplicates"] > 0)
    for result in results[size]:
        on_rank, counts_on_rank, logged_on_rank = result[data][name]
        assert on_rank == pytest.approx(metrics, rel=1e-5, abs=1e-6, nan_ok=True)
        for exact in ("l0", "unfired", "duplicates", "ce_clean", "ce_zero", "ce_mean"):
            assert on_rank.get(exact) == metrics.get(exact)
        assert counts_on_rank == counts
        for values in ("density", "decoder/norm"):
            assert torch.equal(logged_on_rank[values], logged[values])


def test_ranks_share_out_the_passes_of_the_llm_over_3_batches(results):
    """3 baselines and the split SAEs, in 1, 2 or 3 rounds; then those of the rank's own SAE."""
    counted = {
        size: [result["text"]["LLM batches"] for result in results[size]] for size in results
    }
    assert counted == {1: [3 * 4 + 3 + 3], 2: [2 * 4 + 3, 2 * 4 + 3], 3: [4 + 3, 4 + 3, 4]}

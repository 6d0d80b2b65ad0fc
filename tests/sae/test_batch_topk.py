"""BatchTopK: in training batch x k features, afterwards a threshold for each token alone."""

import pytest
import torch
from superposed import activations, l0, make_head, revived, train
from torch import Generator, tensor
from torch.testing import assert_close

from sae_lightning.sae import build_sae
from sae_lightning.sae.batch_topk import THRESHOLD_DECAY
from sae_lightning.sae.topk import TopKConfig


def hand_made(k=1, W_enc=((1.0, 0.0, -1.0), (0.0, 1.0, 0.0))):
    """Two inputs, three features, one output."""
    sae = build_sae(TopKConfig(name="batch_topk", features=3, k=k), 2, 1)
    with torch.no_grad():
        sae.W_enc.copy_(tensor(W_enc))
        sae.W_dec.copy_(tensor([[1.0], [10.0], [100.0]]))
        sae.b_dec.fill_(0.25)
    return sae


# pre-activations (5, 4, -5), (1, 3, -1), (-2, 0.5, 2)
X = tensor([[5.0, 4.0], [1.0, 3.0], [-2.0, 0.5]])


@torch.no_grad()
def test_training_keeps_the_largest_of_the_whole_batch_by_hand():
    # 3 tokens x 1: the three largest of 5, 4, 1, 3, 0.5, 2 are 5, 4 and 3; one token gets none
    sae = hand_made()
    this = sae.training_pass(X)
    assert_close(this.features.values, tensor([[5.0, 4.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]))
    assert_close(this.reconstruction, tensor([[45.25], [30.25], [0.25]]))
    assert torch.equal(this.pre.values, sae.pre_activations(X))
    assert sae.threshold.tolist() == [3.0] * 3, "the smallest that was kept"


@torch.no_grad()
def test_inference_compares_each_strength_with_the_threshold():
    sae = hand_made()
    sae.threshold.fill_(1.5)
    # above 1.5: 5 and 4; 3; 2. Nothing is subtracted from what fires.
    assert_close(sae.encode(X), tensor([[5.0, 4.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 2.0]]))
    assert_close(sae(X).reconstruction, tensor([[45.25], [30.25], [200.25]]))


@torch.no_grad()
def test_inference_does_not_depend_on_the_batch():
    sae = hand_made()
    sae.training_pass(X)
    whole, before = sae(X), sae.state_dict()["threshold"].clone()
    for order in ([2, 0, 1], [1, 2, 0]):
        assert torch.equal(sae(X[order]).features, whole.features[order])
    for i in range(3):
        assert torch.equal(sae(X[i : i + 1]).reconstruction, whole.reconstruction[i : i + 1])
    assert torch.equal(sae.threshold, before), "and changes nothing"


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3, 7])
def test_training_keeps_exactly_batch_times_k(k):
    sae = build_sae(TopKConfig(name="batch_topk", features=40, k=k), 8, 8)
    x = torch.randn(50, 8, generator=Generator().manual_seed(0))
    per_token = (sae.training_pass(x).features.values > 0).sum(dim=1)
    assert per_token.sum() == 50 * k
    assert per_token.min() < k < per_token.max(), "as the tokens need"


@torch.no_grad()
def test_equal_strengths_are_counted_one_by_one():
    """bf16 has few different numbers: all that equal the smallest would be many more."""
    sae = hand_made(W_enc=((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)))
    features = sae.training_pass(tensor([[2.0, 0.0], [2.0, 0.0]])).features.values
    assert (features > 0).sum() == 2
    assert features.sum() == 4


@torch.no_grad()
def test_where_fewer_are_positive_those_fire():
    sae = hand_made(k=2)
    # of 5 pre-activations that are not negative in 2 tokens (1, 0, -1), (-1, 2, 1) three are > 0
    this = sae.training_pass(tensor([[1.0, 0.0], [-1.0, 2.0]]))
    assert_close(this.features.values, tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]]))
    assert sae.threshold.tolist() == [1.0] * 3


def test_where_nothing_is_positive_nothing_fires_and_the_threshold_stays():
    sae = hand_made()
    with torch.no_grad():
        sae.training_pass(X)
        sae.b_enc.fill_(-100)
    this = sae.training_pass(X)
    assert not this.features.values.any()
    assert sae.threshold.tolist() == [3.0] * 3
    this.reconstruction.sum().backward()
    assert not sae.W_enc.grad.any()


def test_where_a_feature_is_off_its_weights_have_no_gradient():
    sae = hand_made()
    sae.training_pass(X).reconstruction.sum().backward()  # 5, 4; 3; none
    assert_close(sae.b_enc.grad, tensor([1.0, 20.0, 0.0]))
    assert_close(sae.W_enc.grad, tensor([[5.0, 60.0, 0.0], [4.0, 70.0, 0.0]]))
    assert_close(sae.W_dec.grad, tensor([[5.0], [7.0], [0.0]]))


def remembered(values: list[float]) -> list[float]:
    """The threshold after each of several batches with such smallest strengths."""
    sae, path = hand_made(), []
    for value in values:
        with torch.no_grad():
            sae.training_pass(tensor([[value, 0.0]]))
        path.append(sae.threshold[0].item())
    return path


def test_the_threshold_of_constant_batches_is_their_smallest_from_the_first_update():
    assert remembered([2.0] * 100) == pytest.approx([2.0] * 100, rel=1e-6)


def test_the_threshold_is_the_mean_of_what_was_smallest_weighted_by_its_age():
    values = [1.0, 5.0, 2.0, 8.0]
    weights = [THRESHOLD_DECAY**age for age in (3, 2, 1, 0)]
    expected = [
        sum(w * v for w, v in zip(weights[-n:], values, strict=False)) / sum(weights[-n:])
        for n in (1, 2, 3, 4)
    ]
    assert remembered(values) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_after_a_few_updates_as_many_fire_in_inference_as_in_training():
    sae = build_sae(TopKConfig(name="batch_topk", features=64, k=5), 16, 16)
    assert (sae(activations(2048, seed=1)).features > 0).sum(dim=1).float().mean() > 20, "no idea"
    for batch in activations()[:1024].split(128):
        sae.training_pass(batch)
    fired = (sae(activations(2048, seed=1)).features > 0).sum(dim=1).float().mean().item()
    assert fired == pytest.approx(5, rel=0.1)


@pytest.mark.slow
def test_a_trained_one_fires_k_times_a_token_in_inference():
    head = make_head("batch_topk", k=4)
    train(head, 120)
    assert l0(head) == pytest.approx(4, rel=0.1)
    assert head.last_step.l0 == 4


def test_resampling_brings_dead_features_back():
    assert revived(make_head("batch_topk", loss={"auxk": 0.0})) >= 12


def test_the_threshold_is_saved_and_how_it_was_found_is_not():
    sae = hand_made()
    with torch.no_grad():
        sae.training_pass(X)
    saved = sae.weights()
    assert saved["threshold"].tolist() == [3.0] * 3
    assert set(saved) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    again = hand_made()
    again.load_weights(saved)
    assert torch.equal(again(X).features, sae(X).features)


def test_a_threshold_in_training_goes_on_where_it_was():
    one, other = hand_made(), hand_made()
    with torch.no_grad():
        one.training_pass(X)
        other.load_state_dict(one.state_dict())
        for sae in (one, other):
            sae.training_pass(X[1:])
    assert torch.equal(one.threshold, other.threshold)

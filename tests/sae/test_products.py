"""Which products a head computes with; training gives the same result with either."""

import pytest
import torch
from superposed import SITE, activations, make_head, train

from sae_lightning.errors import UserError
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.sae.products import break_even_density
from sae_lightning.training.settings import Products


def ways(head, monkeypatch):
    """A list that grows with every update of `head`: whether it was sparse."""
    seen, before = [], head.sae.training_pass

    def training_pass(x, only_active):
        seen.append(only_active)
        return before(x, only_active)

    monkeypatch.setattr(head.sae, "training_pass", training_pass)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_ends_the_same_with_either_products(name):
    ends = {}
    for products in (Products.dense, Products.sparse):
        head = make_head(name)
        head.products = products
        train(head, 40)
        ends[products] = head
    dense, sparse = ends.values()
    for parameter, value in dense.sae.named_parameters():
        other = sparse.sae.get_parameter(parameter)
        assert (value - other).norm() < 1e-3 * value.norm(), parameter
        assert not torch.equal(value, other) or parameter == "b_dec", "they were computed alike"
    assert torch.equal(dense.tokens_since_fired, sparse.tokens_since_fired)
    torch.testing.assert_close(dense.last_step.l0, sparse.last_step.l0)


@pytest.mark.parametrize(("products", "expected"), [("dense", False), ("sparse", True)])
def test_products_can_be_chosen(monkeypatch, products, expected):
    head = make_head("relu")
    head.products = Products[products]
    seen = ways(head, monkeypatch)
    train(head, 3)
    assert seen == [expected] * 3


def test_each_head_follows_its_own_density(monkeypatch):
    """Of 256 x 48 entries 30 are less than the 12 % that pay in float32."""
    head, other = (make_head("relu", start_bias=0.0) for _ in range(2))
    seen = ways(head, monkeypatch)
    batch = {SITE: activations()[:256]}
    assert head.active_density == other.active_density == 1
    head(batch)
    assert 0.3 < head.active_density < 0.7, "at the start about half of the features fire"
    with torch.no_grad():
        level = head.sae.pre_activations(activations()[:256]).flatten().topk(30).values[-1]
        head.sae.b_enc -= 0.999 * level
    head(batch)  # looks as it was last time, and sees
    assert head.active_density == pytest.approx(30 / (256 * 48), rel=0.7)
    head(batch)
    assert head.active_density == 30 / (256 * 48)
    with torch.no_grad():
        head.sae.b_enc += 100
    head(batch)
    assert head.active_density == 1
    head(batch)
    assert seen == [False, False, True, True, False]
    assert other.active_density == 1


def test_the_choice_goes_on_where_it_was():
    head, again = make_head("relu"), make_head("relu")
    head.active_density = 0.01
    again.load_state_dict(head.state_dict())
    x = activations()[:2]
    assert again.use_sparse_products(x)
    assert not make_head("relu").use_sparse_products(x)


def test_a_checkpoint_of_an_earlier_version_is_refused():
    with pytest.raises(UserError, match=r"^resume=nowhere: an earlier version"):
        make_head("relu").set_extra_state({"train/loss": 0.5})


def test_sparse_products_pay_sooner_in_float32_and_nowhere_that_they_are_not_known():
    assert break_even_density("cpu", torch.float32) > break_even_density("cpu", torch.bfloat16) > 0
    assert break_even_density("mps", torch.float32) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_passed_over(name, where, value):
    head = make_head(name)
    head.products = Products.sparse
    x, target = activations()[:64].clone(), activations()[:64]
    if where == "input":
        x[3, 5] = value
    else:
        head.sae.W_enc.data[5, 7] = value
    head.normalise = lambda batch: (x, target)
    loss = head({})
    loss.backward()
    assert not loss.isfinite()
    assert any(not p.grad.isfinite().all() for p in head.sae.parameters() if p.grad is not None)

"""Sparse products give what dense ones give, up to rounding."""

from io import BytesIO

import pytest
import torch
from torch import Generator, tensor
from torch.testing import assert_close

from sae_lightning.sae import ARCHITECTURES, TrainingStatus, build_sae
from sae_lightning.sae.firing import encode_firing
from sae_lightning.sae.jumprelu import JumpReLULoss, PenaltyKind
from sae_lightning.sae.losses import l1
from sae_lightning.sae.matrix import DenseMatrix, SparseMatrix
from sae_lightning.sae.products import dots, weighted_sums
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.sae.sparse import SparsityPattern, encode_entries, find_positive

TOKENS, WIDTH, FEATURES = 64, 24, 1000


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def whole(matrix):
    """[tokens, features], zeros included."""
    rows, columns = matrix.pattern.rows, matrix.pattern.columns
    return torch.zeros(matrix.pattern.shape).index_put((rows, columns), matrix.values)


def apart(one, other):
    """The size of a difference, as a share of what it is a difference from."""
    return ((one - other).norm() / other.norm()).item()


def made(name, density, width_out=WIDTH, **settings):
    """An SAE of which about a share `density` of the features are active, all its numbers drawn."""
    config = ARCHITECTURES[name].config
    if "k" in config.__dataclass_fields__:
        settings["k"] = max(1, round(density * FEATURES))
    sae = build_sae(config(name=name, features=FEATURES, **settings), WIDTH, width_out)
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter += 0.1 * noise(*parameter.shape, seed=number)
        pre = noise(TOKENS, WIDTH) @ sae.W_enc + sae.b_enc
        # so many pre-activations are negative; where k decides, enough are positive
        share = max(0.0, 0.9 - density) if "k" in settings else 1 - density
        sae.b_enc -= pre.flatten().kthvalue(max(1, round(share * pre.numel()))).values
        if name == "jumprelu":
            sae.b_enc += sae.threshold.mean()
        if name == "gated":  # features are strong where gates are open
            sae.b_mag += 1
    return sae


def update(sae, loss, x, target, dead, only_active):
    """Terms, loss, pass and the gradient of every parameter."""
    sae.zero_grad()
    output = sae.training_pass(x, only_active)
    terms = loss.terms(sae, output, target, TrainingStatus(dead, tensor(0.5)))
    total = terms["mse"] + sum(c * terms[name] for name, c in loss.coefficients().items())
    total.backward()
    return terms, output, {name: p.grad.clone() for name, p in sae.named_parameters()}


# the share of [tokens, features] that is active
DENSITIES = [0.001, 0.01, 0.1, 0.5, 1.0]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_ways_give_every_parameter_the_same_gradient(name, density):
    x, target = noise(TOKENS, WIDTH), noise(TOKENS, 20, seed=1)
    dead = torch.arange(FEATURES) % 7 == 0
    sae = made(name, density, width_out=20)
    loss = ARCHITECTURES[name].loss(**({"preact": 1e-3} if name in WITH_PREACT else {}))
    sae.training_pass(x)  # BatchTopK looks for the largest near the threshold that it knows
    dense_terms, dense, expected = update(sae, loss, x, target, dead, only_active=False)
    terms, output, got = update(sae, loss, x, target, dead, only_active=True)
    assert isinstance(output.features, SparseMatrix)
    assert (output.features.values > 0).sum() / dense.features.values.numel() == pytest.approx(
        density, rel=0.35
    )
    assert apart(whole(output.features), dense.features.values) < 1e-5
    assert apart(output.reconstruction, dense.reconstruction) < 1e-5
    assert_close(terms, dense_terms, rtol=1e-4, atol=1e-6)
    assert got.keys() == expected.keys()
    for parameter, gradient in got.items():
        assert apart(gradient, expected[parameter]) < 1e-4, parameter
        assert expected[parameter].any(), parameter


WITH_PREACT = ("relu", "jumprelu", "gated")


@pytest.mark.parametrize(
    ("name", "loss"),
    [("relu", ReLULoss(p=0.3)), ("jumprelu", JumpReLULoss(penalty_kind=PenaltyKind.step))],
)
def test_both_ways_agree_on_the_other_penalties(name, loss):
    x, dead = noise(TOKENS, WIDTH), torch.zeros(FEATURES).bool()
    sae = made(name, 0.1)
    dense_terms, _, expected = update(sae, loss, x, x, dead, only_active=False)
    terms, _, got = update(sae, loss, x, x, dead, only_active=True)
    assert_close(terms, dense_terms)
    assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_bf16_the_sparse_way_is_no_further_from_float32_than_the_dense_one(name):
    x, dead = noise(2048, WIDTH), torch.arange(FEATURES) % 7 == 0
    sae, loss = made(name, 0.05), ARCHITECTURES[name].loss()
    sae.training_pass(x)
    _, exact, truth = update(sae, loss, x, x, dead, only_active=False)
    with torch.autocast("cpu", torch.bfloat16):
        _, dense, expected = update(sae, loss, x, x, dead, only_active=False)
        _, output, got = update(sae, loss, x, x, dead, only_active=True)
    assert output.reconstruction.dtype is torch.float32
    error = apart(output.reconstruction, exact.reconstruction)
    assert 0 < error < 1.25 * apart(dense.reconstruction, exact.reconstruction) < 0.05
    for parameter, gradient in got.items():
        assert gradient.dtype is torch.float32
        error = apart(gradient, truth[parameter])
        assert 0 < error < 1.25 * apart(expected[parameter], truth[parameter]), parameter


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_skip_connection_learns_either_way(name):
    x, target = noise(TOKENS, WIDTH), noise(TOKENS, 20, seed=1)
    dead = torch.zeros(FEATURES).bool()
    sae, loss = made(name, 0.05, width_out=20, skip=True), ARCHITECTURES[name].loss()
    sae.training_pass(x)
    *_, expected = update(sae, loss, x, target, dead, only_active=False)
    *_, got = update(sae, loss, x, target, dead, only_active=True)
    assert_close(got["W_skip"], expected["W_skip"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_where_nothing_fires_nothing_but_the_biases_of_the_output_learns(name):
    sae, x = made(name, 0.1), noise(TOKENS, WIDTH)
    with torch.no_grad():
        sae.b_enc -= 1000
    dead = torch.zeros(FEATURES).bool()
    *_, got = update(sae, ARCHITECTURES[name].loss(), x, x, dead, only_active=True)
    assert got.pop("b_dec").any()
    assert not any(gradient.any() for gradient in got.values())


def test_what_adam_holds_lies_in_memory_as_its_parameter_does():
    """It goes through both by place, not by index."""
    x, dead = noise(TOKENS, WIDTH), torch.zeros(FEATURES).bool()
    sae, loss = made("relu", 0.05), ReLULoss()
    adam = torch.optim.Adam(sae.parameters(), fused=True)
    file = BytesIO()
    for only_active in (False, True):
        update(sae, loss, x, x, dead, only_active)
        adam.step()
    torch.save(adam.state_dict(), file)
    again = torch.optim.Adam(sae.parameters(), fused=True)
    again.load_state_dict(torch.load(BytesIO(file.getvalue()), weights_only=True))
    assert sae.W_enc.stride() == (1, WIDTH)
    for parameter in sae.parameters():
        for optimizer in (adam, again):
            for status in ("exp_avg", "exp_avg_sq"):
                assert optimizer.state[parameter][status].stride() == parameter.stride()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated"])
def test_many_entries_on_two_threads_give_the_same_gradient_every_time(name):
    """Torch adds up the gradient of indexing with brackets in another order each time."""
    config, _, objective = ARCHITECTURES[name]
    sae, loss = build_sae(config(name=name, features=4000, start_bias=0.0), 8, 8), objective()
    x, dead = noise(100, 8), torch.zeros(4000).bool()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, output, first = update(sae, loss, x, x, dead, only_active=True)
        assert len(output.pre.pattern) > 100_000
        for _ in range(10):
            *_, again = update(sae, loss, x, x, dead, only_active=True)
            assert all(torch.equal(gradient, again[name]) for name, gradient in first.items())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "bandwidth"), [(1.0, 0.024), (4.1, 0.1), (0.1, 2.0)])
def test_in_bf16_narrow_windows_are_not_cut_off(threshold, bandwidth):
    sae = made("jumprelu", 0.2, threshold=threshold, bandwidth=bandwidth)
    loss, dead = JumpReLULoss(l0=0.0), torch.zeros(FEATURES).bool()
    x = noise(4096, WIDTH)
    *_, truth = update(sae, loss, x, x, dead, only_active=False)
    with torch.autocast("cpu", torch.bfloat16):
        *_, got = update(sae, loss, x, x, dead, only_active=True)
    assert apart(got["log_threshold"], truth["log_threshold"]) < 0.1


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 1000.0])
def test_batch_topk_finds_the_largest_whatever_threshold_it_knows(name, threshold):
    x, sae = noise(TOKENS, WIDTH), made(name, 0.05)
    sae.threshold.fill_(threshold)
    sae.threshold_weight.fill_(1)
    state = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    found = whole(sae.training_pass(x, only_active=True).features)
    remembered = sae.threshold.clone()
    sae.load_state_dict(sae.state_dict() | state)
    assert_close(found, sae.training_pass(x).features.values)
    assert_close(remembered, sae.threshold)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_density_is_that_of_the_entries_that_are_found(name):
    x, sae = noise(100, WIDTH), made(name, 0.05)
    sae.training_pass(x)
    sparse, dense = sae.training_pass(x, only_active=True), sae.training_pass(x)
    entries = len(sparse.pre.pattern) / (100 * FEATURES)
    assert sae.estimate_density(sparse) == pytest.approx(entries, rel=0.01)
    if name in ("batch_topk", "matryoshka"):  # they look at more than they keep
        assert entries <= sae.estimate_density(dense) < 2 * entries
    else:
        assert sae.estimate_density(dense) == pytest.approx(entries, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1), (64, 1000)])
def test_what_is_positive_is_found(shape, dtype):
    x = noise(*shape).to(dtype)
    x[0, 0] = 0
    x.view(-1)[1:3] = tensor([-0.0, 1e-30])[: x.numel() - 1]
    assert find_positive(x).tolist() == [
        n for n, value in enumerate(x.view(-1).tolist()) if value > 0
    ]


def test_the_bias_loses_nothing_in_bf16():
    # in bf16 1.01 is 1.0078125 and -1 + 1.01 + 0.001 is rounded at the end alone
    x, W_enc = tensor([[1.0]]), tensor([[-1.0, 1.0]])
    shift = tensor([1.01, -1.0])
    with torch.autocast("cpu", torch.bfloat16):
        pattern, values = encode_entries(x, W_enc, shift, find_positive)
    assert pattern.flat_indices.tolist() == [0]
    assert_close(values, tensor([0.01]))


@pytest.mark.parametrize("part", [1, 7, 1000])
def test_entries_are_those_of_the_whole_batch_however_it_is_cut(part, monkeypatch):
    monkeypatch.setattr(
        "sae_lightning.sae.sparse.PRE_ACTIVATIONS_AT_ONCE", {"cpu": part * FEATURES}
    )
    x, W_enc = noise(20, WIDTH), noise(WIDTH, FEATURES, seed=1)
    product = x @ W_enc
    pattern, values = encode_entries(x, W_enc, torch.full((FEATURES,), -4.0), find_positive)
    assert pattern.flat_indices.tolist() == (product > 4).view(-1).nonzero().squeeze(1).tolist()
    assert_close(values, product[product > 4] - 4)


# [3, 4], entries (0, 1), (0, 3), (2, 0), (2, 1)
PLACES = tensor([1, 3, 8, 9])


def test_a_pattern_by_hand():
    pattern = SparsityPattern(PLACES, 3, 4)
    assert pattern.rows.tolist() == [0, 0, 2, 2]
    assert pattern.columns.tolist() == [1, 3, 0, 1]
    assert pattern.offsets.tolist() == [0, 2, 2, 4]
    # columns: 0 has (2: weight 3), 1 has (0: weight 1), (2: weight 4), 3 has (0: weight 2)
    table = tensor([[1.0, 10.0], [5.0, 5.0], [100.0, 1000.0]])
    got = pattern.transposed_product(tensor([1.0, 2, 3, 4]), table)
    assert got.tolist() == [[300, 3000], [1 + 400, 10 + 4000], [0, 0], [2, 20]]
    # columns 0, 1 | 2, 3: row 0 has one in each group, row 2 two in the first
    split = pattern.split_by_group([2, 2])
    assert split.shape == (6, 4)
    assert split.rows.tolist() == [0, 1, 4, 4]
    assert split.columns.tolist() == [1, 3, 0, 1]


def test_a_matrix_by_hand_both_ways():
    sparse = SparseMatrix(tensor([1.0, 0.0, 3.0, 4.0]), SparsityPattern(PLACES, 3, 4))
    dense = DenseMatrix(tensor([[0.0, 1, 0, 0], [0, 0, 0, 0], [3, 4, 0, 0]]))
    assert torch.equal(whole(sparse), dense.values)
    table, norms = tensor([[1.0, 0], [0, 1], [7, 7], [7, 7]]), tensor([10.0, 20, 30, 40])
    for matrix in (sparse, dense):
        assert matrix.batch_size == 3
        assert matrix.count_positive().tolist() == [1, 2, 0, 0]
        assert (matrix @ table).tolist() == [[0, 1], [0, 0], [3, 4]]
        groups = matrix.matmul_by_group([1, 3], table)
        assert [group.tolist() for group in groups] == [
            [[0, 0], [0, 0], [3, 0]],
            [[0, 1], [0, 0], [0, 4]],
        ]
        # (1 x 20 + 3 x 10 + 4 x 20) / 3
        assert matrix.apply_penalty(l1, norms).item() == pytest.approx(130 / 3)
        doubled = matrix.with_values(2 * matrix.values)
        assert (doubled @ table).tolist() == [[0, 2], [0, 0], [6, 8]]
    # of 12 values 4 are entries, and 2 exceed 2
    assert sparse.density_above(2) == 4 / 12
    assert dense.density_above(2) == pytest.approx(2 / 12)
    assert sparse.broadcast(norms).tolist() == [20, 40, 10, 20]
    assert torch.equal(dense.broadcast(norms) + 0 * dense.values, norms.expand(3, 4))
    assert sparse.stored_columns(tensor([1])) is None
    assert dense.stored_columns(tensor([1])).tolist() == [[1], [0], [4]]


def test_the_products_by_hand():
    offsets, columns = tensor([0, 2, 2, 3]), tensor([1, 0, 1])
    table = tensor([[1.0, 2], [3, 4]])
    got = weighted_sums(offsets, columns, tensor([1.0, 10, 100]), table)
    assert got.tolist() == [[13, 24], [0, 0], [300, 400]]
    left = tensor([[1.0, 0], [9, 9], [1, 1]])
    assert dots(offsets, columns, left, table).tolist() == [3, 1, 7]


def test_the_products_of_no_entries_are_0():
    offsets, none = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    table = torch.ones(5, 2)
    assert weighted_sums(offsets, none, torch.zeros(0), table).tolist() == [[0, 0]] * 3
    assert dots(offsets, none, torch.ones(3, 2), table).shape == (0,)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_that_fire_are_those_of_encode_bit_for_bit(name):
    sae, x, keep = made(name, 0.01), noise(TOKENS, WIDTH), torch.arange(TOKENS) % 8 > 0
    if name in ("batch_topk", "matryoshka"):
        sae.threshold.fill_(0.5)
    strengths, units = encode_firing(sae, x, keep)
    expected = sae.encode(x) * keep[:, None]
    assert 0 < len(units) < FEATURES
    assert units.tolist() == (expected > 0).any(dim=0).nonzero().squeeze(1).tolist()
    assert torch.equal(strengths, expected[:, units])

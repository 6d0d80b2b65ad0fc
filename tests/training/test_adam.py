"""Adam with parameters in any memory layout."""

import torch
from torch import Generator

from sae_lightning.training.adam import Adam


def test_it_is_torchs_adam_whatever_the_layout():
    drawn = Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=drawn) for shape in ((30, 20), (20, 30), (7,), ())]
    ours = [start.T.contiguous().T if start.dim() == 2 else start.clone() for start in starts]
    assert not ours[0].is_contiguous()
    ours = [torch.nn.Parameter(start) for start in ours]
    plain = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizers = [
        Adam(
            [{"params": ours[:2], "lr": 0.1}, {"params": ours[2:], "lr": 0.01, "betas": (0, 0.9)}]
        ),
        torch.optim.Adam(
            [{"params": plain[:2], "lr": 0.1}, {"params": plain[2:], "lr": 0.01, "betas": (0, 0.9)}]
        ),
    ]
    for _ in range(4):
        for mine, theirs in zip(ours, plain, strict=True):
            theirs.grad = torch.randn(theirs.shape, generator=drawn)
            mine.grad = torch.empty_like(mine).copy_(theirs.grad)
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs, start in zip(ours, plain, starts, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert (mine != start).all()
        moment = optimizers[0].state[mine]["exp_avg"]
        assert moment.stride() == mine.stride()
        torch.testing.assert_close(moment, optimizers[1].state[theirs]["exp_avg"])

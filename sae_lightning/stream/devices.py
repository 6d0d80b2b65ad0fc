"""From the CPU to where the SAEs train."""

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. A GPU fetches it while the CPU goes on: from pinned memory, which is not
    used for anything else before the copy is done."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)

"""Fused Adam that also takes column-major parameters without copying them."""

from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Adam):
    """torch's fused Adam. On a CPU it would copy non-contiguous tensors, so they are passed
    transposed: the update is elementwise, so the result is the same."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, fused=True)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists[:4]:  # parameters, gradients, first and second moments
            tensors[:] = [x if x.is_contiguous() else x.T for x in tensors]
        return has_complex

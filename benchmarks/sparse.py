"""Up to which density are sparse products faster, and is one encoder product for many SAEs faster?

An update of one SAE (forward, backward, no optimiser) is timed with dense and sparse products in
turn, on random input, at densities (shares of active features) from 0.1 % to 30 %.
`sae_lightning.sae.products.break_even_density` returns the density at which both take equally long.
Then the encoders of eight SAEs are computed one by one and as one product.

    python benchmarks/sparse.py                                  # 2 minutes on two cores
    python benchmarks/sparse.py features=24576 d=768 batch=8192 device=cuda
    python benchmarks/sparse.py precision=fp32                   # the default without bf16
    python benchmarks/sparse.py out=products.json                # writes the tables' numbers, too
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

from sae_lightning.files import write_json
from sae_lightning.llm.load import has_bf16
from sae_lightning.runs.heap import keep_freed_memory
from sae_lightning.sae import SAE, SAEConfig, TrainingStatus, build_sae
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.terminal import console

DENSITIES = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.3)
ROUNDS = 7


def time_alternately(device: str, *ways: Callable[[], object]) -> list[float]:
    """Time several functions, which take turns; returns the median seconds of each."""
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(ROUNDS + 2):
        for way, times in zip(ways, seconds, strict=True):
            started = time.perf_counter()
            way()
            if device != "cpu":
                torch.accelerator.synchronize()
            if number > 1:  # the first two are a warm-up
                times.append(time.perf_counter() - started)
    return [median(times) for times in seconds]


def run_update(sae: SAE, x: Tensor, dtype: torch.dtype, only_active: bool) -> None:
    """Compute loss and gradients of a ReLU SAE."""
    sae.zero_grad()
    status = TrainingStatus(torch.zeros(len(sae.W_dec), device=x.device).bool(), torch.tensor(0.5))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        terms = ReLULoss().terms(sae, sae.training_pass(x, only_active), x, status)
    (terms["mse"] + 1e-3 * terms["l1"]).backward()


def compare_products(x: Tensor, features: int, dtype: torch.dtype) -> Table:
    """Time dense and sparse updates at several densities."""
    sae = build_sae(SAEConfig(features=features), x.shape[1], x.shape[1]).to(x.device)
    title = f"one update, {features:,} features, input {[*x.shape]}, {dtype}"
    table = Table("active", "dense", "sparse", "dense / sparse", title=title)
    for density in DENSITIES:
        with torch.no_grad():  # shift the biases so that a share `density` of entries is positive
            sample = sae.pre_activations(x[:64]).flatten()
            sae.b_enc -= sample.kthvalue(round((1 - density) * len(sample))).values
        ways = [partial(run_update, sae, x, dtype, only_active) for only_active in (False, True)]
        dense, sparse = time_alternately(x.device.type, *ways)
        row = f"{density:.1%}", f"{dense * 1e3:.0f} ms", f"{sparse * 1e3:.0f} ms"
        table.add_row(*row, f"{dense / sparse:.2f}")
    return table


def compare_encoders(x: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Table:
    """Time the encoders of eight SAEs, one by one and as one product."""
    table = Table("features", "one by one", "one product", "ratio", title="encoders of eight SAEs")
    x = x.to(dtype)
    for size in sizes:
        weights = torch.randn(8 * size, x.shape[1], dtype=dtype, device=x.device)

        def encode(parts: Sequence[Tensor]) -> None:
            for part in parts:
                x @ part.T

        ways = [partial(encode, weights.split(size)), partial(encode, [weights])]
        alone, together = time_alternately(x.device.type, *ways)
        row = f"{size:,}", f"{alone * 1e3:.1f} ms", f"{together * 1e3:.1f} ms"
        table.add_row(*row, f"{alone / together:.2f}")
    return table


def main(arguments: list[str]) -> None:
    """Print both tables; with `out`, write them as JSON, {title: {column: [values]}}."""
    options = {"features": "10000", "d": "576", "batch": "2048", "device": "cpu"}
    options |= {"precision": "", "out": ""} | dict(a.split("=", 1) for a in arguments)
    features, d, batch = (int(options[name]) for name in ("features", "d", "batch"))
    x = torch.randn(batch, d, generator=torch.Generator().manual_seed(0)).to(options["device"])
    precision = options["precision"] or ("bf16" if has_bf16(x.device.type) else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    keep_freed_memory()
    tables = [compare_products(x, features, dtype)]
    tables.append(compare_encoders(x, [1024, 4096, features], dtype))
    for table in tables:
        console.print(table)
    if options["out"]:
        columns = {t.title: {c.header: [*c.cells] for c in t.columns} for t in tables}
        write_json(Path(options["out"]), columns)


if __name__ == "__main__":
    main(sys.argv[1:])

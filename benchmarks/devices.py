"""What do several devices change? The same SAEs are trained on one device and on several.

Each device is a process with a GPU or, if there are too few GPUs, with an equal share of the CPU's
cores. A run on one device gets the same share, because the last bits of a result depend on it.

    python benchmarks/devices.py                           # on 2 devices; a few minutes
    python benchmarks/devices.py devices=4 sweep= wide=topk
    python benchmarks/devices.py full                      # 65,536 features, 2,304 dimensions

`sweep=topk,relu,jumprelu`: SAEs on one pass of SmolLM2, each on one of the devices, which send each
other activations. `wide=topk,relu`: each SAE alone, on synthetic activations, split by features
over the devices, which send each other reconstructions. `out=` is the folder for logs and
devices.json (outputs/devices). Everything else is an override for `train.py`.

tokens/s   from before the first fill of the shuffle pool to the last update
sent       by each device, on average, per update: what a process writes, which with gloo is what it
           sends through sockets. With NCCL it is not measured.
least      sweep: each row goes once to each device that did not compute it
           wide: the sum of a batch of reconstructions in float32, of which each of n devices sends
           2 (n - 1) / n
held       size of the weights and of Adam's moments on the device that holds most
peak       memory of the process that needs most, up to the last update
weights    norm of the difference between the trained weights on one device and on several, divided
           by the norm of the weights: rounding, about 1e-6 with trainer.precision=fp32, up to 1e-2
           with bf16, the default where the hardware has it
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from command import run_command, split_options
from rich.table import Table
from safetensors.torch import load_file
from timing.child import Failed, call, make_name

from sae_lightning.files import write_json
from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.terminal import console, phase

CASES = {
    "sweep": [
        "llm=smollm2",
        "llm.batch=8",  # a run computes a whole number of LLM batches
        "model.features=4096",
        "trainer.batch=1024",
        "trainer.tokens=32768",
        "data.pool=8192",
        "eval.loss_tokens=0",
    ],
    "wide": [
        "data=synthetic",
        "data.dim=576",
        "model.features=8192",
        "trainer.batch=1024",
        "trainer.tokens=16384",
        "data.pool=4096",
    ],
}
FULL = [
    "model.features=65536",
    "data.dim=2304",
    "trainer.batch=4096",
    "trainer.tokens=12288",
    "trainer.products=sparse",  # from the first of the three updates on
    "callbacks.dead_after=12000",  # none is dead, so that there is no AuxK
    "data.pool=8192",
    "data.concepts=512",
    "eval.tokens=256",
]
SETTINGS = [  # nothing but updates until the last one
    "eval.tokens=1024",
    "eval.every=${trainer.tokens}",
    "trainer.checkpoint_every=${trainer.tokens}",
    "trainer.log_every=1000",
]
OPTIONS = ("out", "devices", "sweep", "wide")


class Arguments(NamedTuple):
    """The parsed command line."""

    devices: int
    cases: dict[str, list[str]]
    """Name of the case -> the architectures of its SAEs, which train on one pass."""
    overrides: list[str]
    out: Path


def read_arguments(command_line: list[str]) -> Arguments:
    """Parse the command line."""
    full, options, overrides = split_options(command_line, "full", OPTIONS)
    sweep = options.get("sweep", "" if full else "topk,relu,jumprelu")
    wide = options.get("wide", "topk" if full else "topk,relu")
    cases = {"sweep": sweep.split(",")} if sweep else {}
    return Arguments(
        devices=int(options.get("devices", 2)),
        cases=cases | {f"wide {sae}": [sae] for sae in wide.split(",") if sae},
        overrides=[*(FULL if full else []), *overrides],
        out=Path(options.get("out", "outputs/devices")).absolute(),
    )


def make_runs(case: str, devices: int, arguments: Arguments) -> list[list[str]]:
    """The overrides of each SAE of a case, on `devices` devices."""
    saes, settings = arguments.cases[case], CASES[case.split()[0]]
    shared = [f"trainer.devices={devices}", f"sweep.max_heads={len(saes)}", *SETTINGS]
    if torch.cuda.device_count() < arguments.devices:
        threads = max(1, psutil.cpu_count() // arguments.devices)
        shared += ["trainer.accelerator=cpu", "llm.device=cpu", f"trainer.threads={threads}"]
    return [[*settings, *shared, f"model={sae}", *arguments.overrides] for sae in saes]


def compute_least_bytes(case: str, devices: int, rank: dict[str, Any]) -> float:
    """`least` at the top of this file, in bytes, from what one `rank` measured."""
    shares = (devices - 1) / devices
    return shares * rank["rows"] if case == "sweep" else 2 * shares * rank["reconstruction"]


def compare_weights(folder: Path, other: Path) -> float:
    """Norm of the difference of two saved SAEs as a share of the weights' norm; 0 if their files
    are the same bytes."""
    files = [run / "sae" / WEIGHTS for run in (folder, other)]
    if files[0].read_bytes() == files[1].read_bytes():
        return 0.0
    one, two = map(load_file, files)
    difference, whole = (
        sum(x.double().square().sum() for x in tensors)
        for tensors in ((one[name] - two[name] for name in one), one.values())
    )
    return (difference / whole).sqrt().item()


def main(command_line: list[str]) -> None:
    """Measure each case on one device and on several."""
    arguments, results = read_arguments(command_line), []
    shutil.rmtree(arguments.out / "runs", ignore_errors=True)  # a finished run is not trained again
    for case in arguments.cases:
        folders = []
        for devices in dict.fromkeys((1, arguments.devices)):
            name, runs = make_name(case, str(devices)), make_runs(case, devices, arguments)
            folders.append(arguments.out / "runs" / name)
            settings = {"runs": runs, "folder": str(folders[-1])}
            log = arguments.out / "logs" / f"{name}.log"
            try:
                with phase(f"{case} on {devices}"):
                    ranks = call("timing.ranks:measure", settings, log)
            except Failed as error:
                console.print(f"{case} on {devices} failed: {error}")
                break
            result = {"case": case, "devices": devices, **summarize(case, ranks)}
            # on one device, a run is compared with itself
            first, last = folders[0], folders[-1]
            names = [str(index) for index in range(len(runs))]
            result["differences"] = [compare_weights(first / n, last / n) for n in names]
            results.append(result)
            write_json(arguments.out / "devices.json", results)
    console.print(_make_table(results))
    console.print(f"the figures are in {arguments.out / 'devices.json'}")


def summarize(case: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run, from what each rank measured."""
    sent = [rank["sent"] for rank in ranks]
    return {
        "tokens_per_second": ranks[0]["tokens_per_second"],
        "sent_bytes": None if None in sent else sum(sent) / len(ranks),
        "least_bytes": compute_least_bytes(case, len(ranks), ranks[0]),
        "held_bytes": max(rank["held"] for rank in ranks),
        "peak_memory_gb": max(rank["peak_memory_gb"] for rank in ranks),
        "ranks": ranks,
    }


def _make_table(results: list[dict[str, Any]]) -> Table:
    names = ("", "devices", "tokens/s", "sent MB", "least MB", "ratio", "held MB", "peak GB")
    table = Table(*names, "weights", box=None, padding=(0, 1, 0, 0))
    for r in results:
        sent, least = r["sent_bytes"], r["least_bytes"]
        largest = max(r["differences"])
        table.add_row(
            r["case"],
            str(r["devices"]),
            f"{r['tokens_per_second']:,.0f}",
            "-" if sent is None else f"{sent / 1e6:.2f}",
            f"{least / 1e6:.2f}",
            f"{sent / least:.3f}" if sent and least else "",
            f"{r['held_bytes'] / 1e6:,.1f}",
            f"{r['peak_memory_gb']:.2f}",
            f"differ by {largest:.0e}" if largest else "same bytes",
        )
    return table


if __name__ == "__main__":
    run_command(main)

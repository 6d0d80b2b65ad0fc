"""How fast is training from end to end, where does the time go, and how near is it to the limit?

Each run is what `train.py` does, from the config to the trained SAE, in its own process. The shares
come from a second run that is profiled in its middle, so that profiling slows down no timed run.

    python benchmarks/throughput.py                        # ReLU at L0 = 100, BatchTopK at k = 64
    python benchmarks/throughput.py gpu                    # GPT-2 small's shape, for a large GPU
    python benchmarks/throughput.py models=smollm2,gpt2,pythia_160m,gemma_2_2b
    python benchmarks/throughput.py runs=topk:model.k=32,jumprelu layer.index=20 model.features=2048
    python benchmarks/throughput.py sweep=8                # 8 values of one setting on one pass
    python benchmarks/throughput.py trainer.tokens=16384 model.features=512 data.pool=4096

`models`: smollm2 is the packaged LLM; the others have real shapes and random weights
(`timing/models.py` lists them). `profile=false` skips the second run; `out=` is the folder for logs
and throughput.json (outputs/throughput). Everything else is an override for `train.py`.

tokens/s   tokens divided by the time spent in the stream and the SAEs, as in `metrics.json`
in all     tokens divided by all time from before the first fill of the shuffle pool to the last
           update, with Lightning's loop; loading, evaluation and checkpoints are before and after
of floor   "in all" as a share of the speed 1 / (1/LLM + 1/encode), at which only the LLM and one
           dense encoder product would run, one after the other; both are measured alone
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from command import run_command, split_options
from rich.table import Table
from timing.child import Failed, call, make_name
from timing.models import CONFIGS, make_random_llm

from sae_lightning.errors import UserError
from sae_lightning.files import write_json
from sae_lightning.llm.packaged import PACKAGED
from sae_lightning.terminal import console, phase

SETTINGS = [
    "model.features=10000",
    "trainer.batch=2048",
    "trainer.tokens=204800",
    "data.context=128",
    "eval.every=${trainer.tokens}",
    "trainer.checkpoint_every=${trainer.tokens}",
    "eval.tokens=2048",
    "eval.loss_tokens=1024",
]
GPU = [
    "model.features=24576",
    "trainer.batch=8192",
    "trainer.tokens=16777216",
    "trainer.log_every=50",
    "data.pool=524288",
    "llm.batch=128",
]
SETTING = {  # architecture -> the override for its sparsity
    # L0 100 after 100 updates; with loss.target_l0, L0 would start far higher
    "relu": "loss.l1=7e-3",
    "topk": "model.k=64",
    "batch_topk": "model.k=64",
    "jumprelu": "loss.target_l0=100",
    "gated": "loss.target_l0=100",
    "matryoshka": "model.k=64",
}
OPTIONS = ("out", "models", "runs", "sweep", "profile")
GPU_RUNS = "relu:loss.target_l0=60,topk:model.k=32"


class Arguments(NamedTuple):
    """The parsed command line."""

    models: list[str]
    runs: list[tuple[str, str]]
    """Architecture, and the override for its sparsity."""
    overrides: list[str]
    sweep: int
    profile: bool
    out: Path


def read_arguments(command_line: list[str]) -> Arguments:
    """Parse the command line, with defaults for a laptop or for a GPU."""
    gpu, options, overrides = split_options(command_line, "gpu", OPTIONS)
    runs = []
    for run in options.get("runs", GPU_RUNS if gpu else "relu,batch_topk").split(","):
        architecture, _, setting = run.partition(":")
        if architecture not in SETTING:
            raise UserError(f"runs={run}: no such architecture; choose from {', '.join(SETTING)}")
        runs.append((architecture, setting or SETTING[architecture]))
    if len({*runs}) < len(runs):
        raise UserError(f"runs={options['runs']}: the same run twice; give each once")
    models = options.get("models", "gpt2" if gpu else "smollm2").split(",")
    if unknown := [m for m in models if m not in {*PACKAGED, *CONFIGS}]:
        choices = ", ".join({**PACKAGED, **CONFIGS})
        raise UserError(f"models={unknown[0]}: no such model; choose from {choices}")
    return Arguments(
        models=models,
        runs=runs,
        overrides=[*SETTINGS, *(GPU if gpu else []), *overrides],
        sweep=int(options.get("sweep", 1)),
        profile=options.get("profile", "true") == "true",
        out=Path(options.get("out", "outputs/throughput")).absolute(),
    )


def compute_floor(llm: float, encode: float, saes: int = 1) -> float:
    """Tokens/s if each token goes through the LLM and then the encoder of each SAE, one after the
    other: 1 / (1/llm + saes/encode); `llm` and `encode`: tokens/s of each alone."""
    return 1 / (1 / llm + saes / encode)


def compute_llm_floor(flops: float, parameters: int) -> float:
    """Tokens/s of blocks with `parameters` parameters at the rate `flops` [FLOP/s]: 2 FLOP per
    parameter and token; attention scores, which have no parameters, are left out."""
    return flops / (2 * parameters)


def spread_values(setting: str, n: int) -> list[str]:
    """Make overrides with n values of a setting, from half of its value to twice it."""
    name, _, value = setting.partition("=")
    if n == 1:
        return [setting]
    values = [float(value) * 2 ** (2 * i / (n - 1) - 1) for i in range(n)]
    return [f"{name}={round(v) if value.isdigit() else f'{v:.3g}'}" for v in values]


def main(command_line: list[str]) -> None:
    """Measure everything, one process after another."""
    arguments, results, roofs = read_arguments(command_line), [], {}
    shutil.rmtree(arguments.out / "runs", ignore_errors=True)  # a finished run is not trained again
    for model in arguments.models:
        llm = make_llm_overrides(model, arguments)
        roof = _call_child(arguments, f"{model}-roofline", "timing.ours:measure_roofline", run=llm)
        if not roof:
            continue
        rates = roof["llm_tokens_per_second"], roof["encode_tokens_per_second"]
        roof["floor_tokens_per_second"] = compute_floor(*rates)
        blocks = roof["llm_block_parameters"]
        roof["llm_floor_tokens_per_second"] = compute_llm_floor(roof["flops"], blocks)
        roofs[model] = roof
        for architecture, setting in arguments.runs:
            if result := _measure_row(arguments, model, llm, architecture, setting, roof):
                results.append(result)
            write_json(arguments.out / "throughput.json", {"roofline": roofs, "runs": results})
    _show(results, roofs)
    console.print(f"the figures are in {arguments.out / 'throughput.json'}")


def make_llm_overrides(model: str, arguments: Arguments) -> list[str]:
    """Make the overrides that choose the LLM, followed by those of the command line."""
    if model in PACKAGED:
        return [f"llm={model}", *arguments.overrides]
    index = {"gpt2": 8, "pythia_160m": 8, "gemma_2_2b": 12}[model]  # layer.index in conf/llm
    for override in arguments.overrides:
        index = int(override.split("=")[1]) if override.startswith("layer.index=") else index
    folder = make_random_llm(model, index, arguments.out / "models")
    return [f"llm={model}", f"llm.name={folder}", *arguments.overrides]


def _measure_row(
    arguments: Arguments,
    model: str,
    llm: list[str],
    architecture: str,
    setting: str,
    roof: dict[str, Any],
) -> dict[str, Any] | None:
    """Measure one row of the table: a run and, if that succeeds, its profile; None if the run
    fails."""
    runs = [
        [f"model={architecture}", *llm, value, f"sweep.max_heads={arguments.sweep}"]
        for value in spread_values(setting, arguments.sweep)
    ]
    name = make_name(model, architecture, setting)
    measured = _call_child(arguments, name, "timing.ours:measure", runs=runs)
    if not measured:
        return None
    result = {"model": model, "architecture": architecture, "setting": setting, "saes": len(runs)}
    result |= measured
    if arguments.profile:
        result["profile"] = _call_child(
            arguments, f"{name}-profile", "timing.ours:profile_run", runs=runs
        )
    rates = roof["llm_tokens_per_second"], roof["encode_tokens_per_second"]
    result["share_of_floor"] = result["tokens_per_second"] / compute_floor(*rates, saes=len(runs))
    console.print(f"{name}: {result['tokens_per_second'] * len(runs):,.0f} tokens/s")
    return result


def _call_child(
    arguments: Arguments, name: str, function: str, **settings: Any
) -> dict[str, Any] | None:
    """Call `function` in a process; if it fails, prints the reason and returns None."""
    settings |= {"folder": str(arguments.out / "runs" / name)}
    try:
        with phase(name):
            return call(function, settings, arguments.out / "logs" / f"{name}.log")
    except Failed as error:
        console.print(f"{name} failed: {error}")
        return None


def _show(results: list[dict], roofs: dict[str, dict]) -> None:
    """Print all tables; speeds are summed over the SAEs of a pass."""
    names = ("LLM", "SAE", "tokens/s", "in all", "of floor", "L0", "EV", "GB")
    table = Table(*names, box=None, padding=(0, 1, 0, 0))
    for r in results:
        table.add_row(
            r["model"],
            _describe_saes(r),
            f"{r['speed']['tokens_per_second'] * r['saes']:,.0f}",
            f"{r['tokens_per_second'] * r['saes']:,.0f}",
            f"{r['share_of_floor']:.0%}",
            f"{r['l0']:.0f}",
            f"{r['explained_variance']:.3f}",
            f"{r['peak_memory_gb']:.2f}",
        )
    console.print(table)
    if profiled := [r for r in results if r.get("profile")]:
        console.print(_make_share_table(profiled))
    for model, roof in roofs.items():
        console.print(_describe_roofline(model, roof))


def _describe_saes(result: dict) -> str:
    """Describe the SAEs of a row: number, architecture, sparsity."""
    number = f"{result['saes']} x " if result["saes"] > 1 else ""
    return f"{number}{result['architecture']} {result['setting'].partition('.')[2]}"


def _make_share_table(results: list[dict]) -> Table:
    """Make a table of the shares of time in the profiled updates, a column for each part."""
    parts = list(results[0]["profile"]["shares"])
    table = Table("share of time", *parts, box=None, padding=(0, 1, 0, 0))
    for r in results:
        shares = r["profile"]["shares"]
        cells = [f"{shares[part]:.1%}" for part in parts]
        table.add_row(f"{r['model']} {_describe_saes(r)}", *cells)
    last = results[-1]["profile"]
    largest = ", ".join(f"{name[:60]} {share:.0%}" for name, share in last["largest"].items())
    table.caption = f"largest in the last row: {largest}"
    table.caption_justify = "left"
    return table


def _describe_roofline(model: str, roof: dict[str, Any]) -> str:
    llm, encode = roof["llm_tokens_per_second"], roof["encode_tokens_per_second"]
    near = llm / roof["llm_floor_tokens_per_second"]
    return (
        f"{model}: {roof['flops'] / 1e9:,.0f} GFLOP/s in {roof['number']}; encode alone "
        f"{encode:,.0f} tokens/s, LLM alone {llm:,.0f} ({near:.0%} of that rate); "
        f"floor {roof['floor_tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    run_command(main)

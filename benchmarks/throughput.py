"""How fast is training from end to end, where does the time go, and how far is it from the floor?

Each run is `train.py`'s own way from the config to the trained SAE, in a process of its own. The
shares come from a second run, profiled in its middle, so that the first is not disturbed.

    python benchmarks/throughput.py                        # ReLU at L0 = 100, BatchTopK at k = 64
    python benchmarks/throughput.py gpu                    # GPT-2 small's shape, for a large GPU
    python benchmarks/throughput.py models=smollm2,gpt2,pythia_160m,gemma_2_2b
    python benchmarks/throughput.py runs=topk:model.k=32,jumprelu layer.index=20 model.features=2048
    python benchmarks/throughput.py sweep=8                # 8 values of one setting on one pass
    python benchmarks/throughput.py trainer.tokens=16384 model.features=512 data.pool=4096

`models`: smollm2 is the packaged LLM; the others have real shapes and random weights
(`timing/models.py` says which). `profile=false` leaves the second run out; `out=` is where logs and
throughput.json go (outputs/throughput). Everything else is an override, as of `train.py`.

tokens/s   the stream's and the SAEs' own time, as `metrics.json` has it
in all     from before the first fill of the shuffle pool to the last update, with Lightning's loop;
           loading, evaluation and checkpoints come before and after
of floor   "in all" as a share of 1 / (1/LLM + 1/encode), both measured alone
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from command import command
from rich.table import Table
from timing.child import Failed, call, name_of
from timing.models import CONFIGS, saved

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
SETTING = {  # architecture -> what says how sparse it is
    # L0 100 after 100 updates; to be steered there, it would start from a far higher L0
    "relu": "loss.l1=7e-3",
    "topk": "model.k=64",
    "batch_topk": "model.k=64",
    "jumprelu": "loss.target_l0=100",
    "gated": "loss.target_l0=100",
    "matryoshka": "model.k=64",
}
OURS = ("out", "models", "runs", "sweep", "profile")
GPU_RUNS = "relu:loss.target_l0=60,topk:model.k=32"


class Asked(NamedTuple):
    """What the command line says."""

    models: list[str]
    runs: list[tuple[str, str]]
    """Architecture, and the setting that says how sparse it is."""
    overrides: list[str]
    sweep: int
    profile: bool
    out: Path


def read(arguments: list[str]) -> Asked:
    """The command line, with the defaults of a laptop or of a GPU."""
    gpu = "gpu" in arguments
    given = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in OURS)
    overrides = [a for a in arguments if a != "gpu" and a.partition("=")[0] not in OURS]
    if stray := [a for a in overrides if "=" not in a]:
        raise UserError(f"{stray[0]}: unknown; give gpu, {'=, '.join(OURS)}=, or an override")
    runs = []
    for run in given.get("runs", GPU_RUNS if gpu else "relu,batch_topk").split(","):
        architecture, _, setting = run.partition(":")
        if architecture not in SETTING:
            raise UserError(f"runs={run}: no such architecture; choose from {', '.join(SETTING)}")
        runs.append((architecture, setting or SETTING[architecture]))
    if len({*runs}) < len(runs):
        raise UserError(f"runs={given['runs']}: the same run twice; give each once")
    models = given.get("models", "gpt2" if gpu else "smollm2").split(",")
    if unknown := [m for m in models if m not in {*PACKAGED, *CONFIGS}]:
        choices = ", ".join({**PACKAGED, **CONFIGS})
        raise UserError(f"models={unknown[0]}: no such model; choose from {choices}")
    return Asked(
        models=models,
        runs=runs,
        overrides=[*SETTINGS, *(GPU if gpu else []), *overrides],
        sweep=int(given.get("sweep", 1)),
        profile=given.get("profile", "true") == "true",
        out=Path(given.get("out", "outputs/throughput")).absolute(),
    )


def floor(llm: float, encode: float, saes: int = 1) -> float:
    """The speed at which each token goes through the LLM and then through the encode of each SAE,
    one after the other: 1 / (1/llm + saes/encode)."""
    return 1 / (1 / llm + saes / encode)


def llm_floor(flops: float, parameters: int) -> float:
    """The speed of blocks with so many parameters at the rate `flops` [FLOP/s]: 2 FLOP a
    parameter and token; attention's scores, which have no parameters, are left out."""
    return flops / (2 * parameters)


def spread(setting: str, n: int) -> list[str]:
    """n values of a setting, from half of its value to twice it, as overrides."""
    name, _, value = setting.partition("=")
    if n == 1:
        return [setting]
    values = [float(value) * 2 ** (2 * i / (n - 1) - 1) for i in range(n)]
    return [f"{name}={round(v) if value.isdigit() else f'{v:.3g}'}" for v in values]


def main(arguments: list[str]) -> None:
    """Measure everything, one process after another."""
    asked, results, roofs = read(arguments), [], {}
    shutil.rmtree(asked.out / "runs", ignore_errors=True)  # a finished run is not trained again
    for model in asked.models:
        llm = llm_overrides(model, asked)
        roof = _child(asked, f"{model}-roofline", "timing.ours:roofline", run=llm)
        if not roof:
            continue
        rates = roof["llm_tokens_per_second"], roof["encode_tokens_per_second"]
        roof["floor_tokens_per_second"] = floor(*rates)
        blocks = roof["llm_block_parameters"]
        roof["llm_floor_tokens_per_second"] = llm_floor(roof["flops"], blocks)
        roofs[model] = roof
        for architecture, setting in asked.runs:
            if result := _result(asked, model, llm, architecture, setting, roof):
                results.append(result)
            write_json(asked.out / "throughput.json", {"roofline": roofs, "runs": results})
    _show(results, roofs)
    console.print(f"the figures are in {asked.out / 'throughput.json'}")


def llm_overrides(model: str, asked: Asked) -> list[str]:
    """The overrides that choose the LLM and the rest of the command line."""
    if model in PACKAGED:
        return [f"llm={model}", *asked.overrides]
    index = {"gpt2": 8, "pythia_160m": 8, "gemma_2_2b": 12}[model]  # conf/llm
    for override in asked.overrides:
        index = int(override.split("=")[1]) if override.startswith("layer.index=") else index
    folder = saved(model, index, asked.out / "models")
    return [f"llm={model}", f"llm.name={folder}", *asked.overrides]


def _result(
    asked: Asked, model: str, llm: list[str], architecture: str, setting: str, roof: dict[str, Any]
) -> dict[str, Any] | None:
    """One row of the table: a run, and a profile of it if that succeeds; None if the run fails."""
    runs = [
        [f"model={architecture}", *llm, value, f"sweep.max_heads={asked.sweep}"]
        for value in spread(setting, asked.sweep)
    ]
    name = name_of(model, architecture, setting)
    measured = _child(asked, name, "timing.ours:measure", runs=runs)
    if not measured:
        return None
    result = {"model": model, "architecture": architecture, "setting": setting, "saes": len(runs)}
    result |= measured
    if asked.profile:
        result["profile"] = _child(asked, f"{name}-profile", "timing.ours:look", runs=runs)
    rates = roof["llm_tokens_per_second"], roof["encode_tokens_per_second"]
    result["share_of_floor"] = result["tokens_per_second"] / floor(*rates, saes=len(runs))
    console.print(f"{name}: {result['tokens_per_second'] * len(runs):,.0f} tokens/s")
    return result


def _child(asked: Asked, name: str, work: str, **settings: Any) -> dict[str, Any] | None:
    """What `work` answers; None, and a line that says why, if it fails: the others go on."""
    settings |= {"folder": str(asked.out / "runs" / name)}
    try:
        with phase(name):
            return call(work, settings, asked.out / "logs" / f"{name}.log")
    except Failed as error:
        console.print(f"{name} failed: {error}")
        return None


def _show(results: list[dict], roofs: dict[str, dict]) -> None:
    """The tables of everything so far; speeds are summed over the SAEs of a pass."""
    names = ("LLM", "SAE", "tokens/s", "in all", "of floor", "L0", "EV", "GB")
    table = Table(*names, box=None, padding=(0, 1, 0, 0))
    for r in results:
        table.add_row(
            r["model"],
            _saes(r),
            f"{r['speed']['tokens_per_second'] * r['saes']:,.0f}",
            f"{r['tokens_per_second'] * r['saes']:,.0f}",
            f"{r['share_of_floor']:.0%}",
            f"{r['l0']:.0f}",
            f"{r['explained_variance']:.3f}",
            f"{r['peak_memory_gb']:.2f}",
        )
    console.print(table)
    if profiled := [r for r in results if r.get("profile")]:
        console.print(_shares(profiled))
    for model, roof in roofs.items():
        console.print(_roofline(model, roof))


def _saes(result: dict) -> str:
    """The SAEs of a row: how many, which, and how sparse."""
    number = f"{result['saes']} x " if result["saes"] > 1 else ""
    return f"{number}{result['architecture']} {result['setting'].partition('.')[2]}"


def _shares(results: list[dict]) -> Table:
    """Shares of time in the profiled updates, a column for each part."""
    parts = list(results[0]["profile"]["shares"])
    table = Table("share of time", *parts, box=None, padding=(0, 1, 0, 0))
    for r in results:
        found = r["profile"]["shares"]
        shares = [f"{found[part]:.1%}" for part in parts]
        table.add_row(f"{r['model']} {_saes(r)}", *shares)
    last = results[-1]["profile"]
    largest = ", ".join(f"{name[:60]} {share:.0%}" for name, share in last["largest"].items())
    table.caption = f"largest in the last row: {largest}"
    table.caption_justify = "left"
    return table


def _roofline(model: str, roof: dict[str, Any]) -> str:
    llm, encode = roof["llm_tokens_per_second"], roof["encode_tokens_per_second"]
    near = llm / roof["llm_floor_tokens_per_second"]
    return (
        f"{model}: {roof['flops'] / 1e9:,.0f} GFLOP/s in {roof['number']}; encode alone "
        f"{encode:,.0f} tokens/s, LLM alone {llm:,.0f} ({near:.0%} of that rate); "
        f"floor {roof['floor_tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    command(main)

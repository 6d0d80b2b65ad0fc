"""Prints the plan of a pass, and the results."""

from pathlib import Path

from sae_lightning.report.sweep_table import measure_gap_closed
from sae_lightning.runs.jobs import Job
from sae_lightning.runs.plan import PlannedPass
from sae_lightning.sae import count_parameters
from sae_lightning.scoring import scorecard
from sae_lightning.terminal import (
    console,
    format_command,
    format_tensorboard_command,
    make_grid,
    shorten_path,
)
from sae_lightning.training.module import SAEModule


def print_plan(planned: PlannedPass, inputs: dict[str, str]) -> None:
    """Print the SAEs, their data (`inputs`: label -> text) and the folder of the results."""
    jobs, llm, steps_done = planned.jobs, planned.llm, planned.steps_done
    trainer = jobs[0].config.trainer
    parameters = sum(
        count_parameters(job.config.model, *map(llm.width_at, pair))
        for job, pair in zip(jobs, planned.sites, strict=True)
    )
    models = [job.config.model for job in jobs]
    sizes = dict.fromkeys(f"{model.name}, {model.features:,} features" for model in models)
    lines = {
        **inputs,
        **jobs[0].config.data_source.describe_sites(planned.sites, llm),
        "SAE": (f"{len(jobs)} of " if len(jobs) > 1 else "")
        + f"{'; '.join(sizes)}, {parameters / 1e6:.1f} M parameters, {trainer.precision.name}",
        "training": f"{trainer.steps * trainer.batch:,} tokens in {trainer.steps:,} updates of "
        f"{trainer.batch:,}",
        "results": str(shorten_path(jobs[0].folder if len(jobs) == 1 else jobs[0].folder.parent)),
    }
    if len(planned.shares) > 1:
        split_count, whole_count = len(planned.split), len(jobs) - len(planned.split)
        lines["devices"] = str(len(planned.shares))
        if split_count:
            lines["devices"] += f", {split_count} of the SAEs split by features"
        if whole_count:
            lines["devices"] += f", {whole_count} of them whole, each on one device"
    if starts := dict.fromkeys(model.start for model in models if model.start):
        lines["starting from"] = ", ".join(str(shorten_path(Path(start))) for start in starts)
    if steps_done:
        lines["resuming"] = f"after {steps_done * trainer.batch:,} tokens"
    console.print(make_grid(lines))


def print_results(job: Job, metrics: dict) -> None:
    """Print the metrics of a finished run, and the commands to run next."""
    speed, dead = metrics["speed"], metrics["training"]["train/dead"]
    noun = job.config.data_source.noun  # text, samples or rows
    held_out = scorecard.format_lines(metrics["held_out"], noun)
    training = {"dead features": f"{dead:.1%}", "peak memory": f"{speed['peak_memory_gb']:.1f} GB"}
    if "before_kl" in metrics:
        held_out["with loss.kl"] = _format_kl_effect(metrics["before_kl"], metrics["held_out"])
    if "fates" in metrics:  # numbers of features that stayed, died, ...
        held_out["since the warm start"] = ", ".join(
            f"{n:,} {name}" for name, n in metrics["fates"].items()
        )
        held_out["at the start"] = (
            f"explained variance {metrics['start']['explained_variance']:.4f}, "
            f"L0 {metrics['start']['l0']:.1f}"
        )
    if "tokens_per_second" in speed:
        training["speed"] = format_speed(job, speed)
    console.print(make_grid(held_out, title=f"on held-out {noun}"))
    console.print(make_grid(training, title="in training"))
    folder = shorten_path(job.folder)
    # outputs/ or multirun/, so that TensorBoard also shows earlier runs
    root = Path(folder.parts[0]) if folder.parts and not folder.is_absolute() else folder
    analyze = format_command("analyze.py", run=folder, **job.trust_overrides)
    console.print(f"\n  {format_tensorboard_command(root)}\n  {analyze}\n")


def _format_kl_effect(before: dict[str, float], after: dict[str, float]) -> str:
    """The effect of fine-tuning with `loss.kl`: held-out CE and KL before and after."""
    ce, kl = (f"{before[name]:.4f} -> {after[name]:.4f}" for name in ("ce_spliced", "kl"))
    closed = measure_gap_closed(before, after)
    gap = "" if closed is None else f" ({closed:.0%} of the gap closed)"
    return f"CE with the SAE {ce}{gap}, KL {kl}"


def format_speed(job: Job, speed: dict[str, float]) -> str:
    """Tokens per second and, if measured, the shares of LLM, data and SAE in the time."""
    shares = ""
    if "llm_share" in speed:
        llm = f"LLM {speed['llm_share']:.0%}, " if speed["llm_share"] else ""
        data = f"{job.config.data_source.noun} and pool {speed['data_share']:.0%}"
        shares = f" ({llm}{data}, SAE {speed['sae_share']:.0%} of the time)"
    return (
        f"{speed['tokens_per_second']:,.0f} tokens/s{shares}, "
        f"{speed['tokens_per_second_in_all']:,.0f} with evaluation and checkpoints"
    )


def print_how_to_continue(module: SAEModule) -> None:
    """Print, after Ctrl-C or SIGTERM, the command that resumes training."""
    console.print(
        f"stopped by {module.stopped_by.name} and saved at {module.tokens_seen:,} tokens. "
        f"Continue with\n\n  {module.resume}\n"
    )

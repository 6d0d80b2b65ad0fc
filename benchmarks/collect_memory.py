"""Does memory grow with the amount of text, and how much does an overview of many features take?

    python benchmarks/collect_memory.py

Runs a survey of 100,000 tokens and one of 1,000,000, each in its own process, on the packaged LLM
with an SAE of random weights (64 active features per token). Prints both peaks of memory and their
ratio, which should be at most 1.1. On two cores: 2.170 GB and 2.264 GB, ratio 1.043.

Time and memory of an overview, and the size of its page, by the number of features:

    python benchmarks/collect_memory.py --tokens 131072 --grow 16384 32768 65536 131072

For each number of features it runs all of `analyze.py run=...` in its own process, on a random LLM
of GPT-2's width (with only two blocks, to be fast) and with SmolLM2's tokenizer. The SAE is a
JumpReLU SAE of random directions with 64 active features per token; every hundredth feature is a
copy of another. Prints seconds in total and without reading text, peak memory, size of the page
with its files, and seconds until Chromium shows it.
"""

import argparse
import cProfile
import json
import pstats
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sae_lightning.terminal import console

WIDTH, ACTIVE = 768, 64
# file -> functions that read text with the LLM and the SAE
READING = {
    "collect.py": {"collect"},
    "scorecard.py": {"_measure_reconstruction"},
    "held_out.py": {"_capture"},
    "splice.py": {"score_baseline", "score_splices"},
    "load.py": {"load_llm", "load_tokenizer"},
    "tokens.py": {"open_tokens"},
}


def measure_survey(tokens: int, features: int, block: int) -> dict[str, Any]:
    """Run one survey; returns its tokens and the peak memory in bytes."""
    from sae_lightning.analysis.subject import Subject
    from sae_lightning.analysis.survey.survey import survey
    from sae_lightning.llm.load import LLMConfig, read_llm_shape
    from sae_lightning.llm.sites import LayerConfig
    from sae_lightning.runs.config import Config
    from sae_lightning.sae import ARCHITECTURES, build_sae
    from sae_lightning.stream.plays import PlaysConfig

    topk = ARCHITECTURES["topk"]
    config = Config(
        llm=LLMConfig(name="smollm2", device="cpu"),
        data=PlaysConfig(),
        layer=LayerConfig(index=block),
        model=topk.config(name="topk", features=features, k=ACTIVE),
        loss=topk.loss(),
    )
    llm = read_llm_shape(config.llm)
    sae = build_sae(config.model, llm.width, llm.width).requires_grad_(False)
    subject = Subject(Path(), sae, config.layer.resolve_sites(llm.layers), config)
    result = survey(subject, subject.corpus.train, tokens=tokens)
    return {"tokens": result.features.statistics.tokens, "peak": read_peak_memory()}


def read_peak_memory() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_llm(folder: Path) -> torch.Tensor:
    """Save a random LLM; returns activations [n, d] after its first block."""
    import transformers

    from sae_lightning.llm.load import LLMConfig, load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(LLMConfig(name="smollm2", device="cpu"))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"n_layer": 2, "n_embd": WIDTH, "n_positions": 256, "vocab_size": len(tokenizer)}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens = torch.randint(0, len(tokenizer), (16, 127))
    with torch.no_grad():
        states = model.transformer(tokens, output_hidden_states=True).hidden_states
    return states[1].flatten(0, 1)


def make_sae(folder: Path, llm: Path, features: int, x: torch.Tensor) -> None:
    """Save a random SAE whose thresholds fit activations like x [n, d]."""
    from sae_lightning.formats.saved_format import save_sae
    from sae_lightning.sae import ARCHITECTURES, build_sae

    config = ARCHITECTURES["jumprelu"].config(name="jumprelu", features=features)
    sae = build_sae(config, WIDTH, WIDTH).requires_grad_(False)
    rows = torch.nn.functional.normalize(sae.W_dec)
    rows[1::100] = rows[::100][: len(rows[1::100])] + 0.01 * torch.randn(WIDTH)
    pre = (x - x.mean(0)) @ rows[:4096].T  # of some features, centred
    threshold = pre.flatten().topk(int(pre.numel() * ACTIVE / features)).values[-1]
    weights = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_dec": x.mean(0)}
    weights["b_enc"], weights["threshold"] = -(rows @ x.mean(0)), threshold.expand(features).clone()
    metadata = {"model_name": str(llm), "hook_name": "blocks.0.hook_resid_post"}
    (folder / "sae").mkdir(parents=True)
    save_sae(folder / "sae", sae, weights, metadata)


def measure_overview(tokens: int, features: int) -> dict[str, Any]:
    """Make an SAE of random weights and its overview; returns time and memory of the overview."""
    from sae_lightning.analysis.overview import OverviewTask
    from sae_lightning.llm.load import LLMConfig
    from sae_lightning.llm.sites import LayerConfig
    from sae_lightning.stream.plays import PlaysConfig

    with tempfile.TemporaryDirectory() as folder:
        run, llm = Path(folder, "run"), Path(folder, "llm")
        make_sae(run, llm, features, make_llm(llm))
        task = OverviewTask(
            run=str(run),
            task="overview",
            llm=LLMConfig(name=str(llm), device="cpu"),
            data=PlaysConfig(),
            layer=LayerConfig(index=0),
            tokens=tokens,
        )
        profile, begin = cProfile.Profile(), time.perf_counter()
        profile.runcall(task.execute, {"llm", "llm.name", "data", "layer"})
        seconds, reading = time.perf_counter() - begin, 0.0
        for (file, _, name), (*_, cumulative, _) in pstats.Stats(profile).stats.items():
            if "sae_lightning" in file and name in READING.get(Path(file).name, ()):
                reading += cumulative
        index = run / "analysis" / "index.html"
        files = [index, *(file for file in index.parent.glob("index-*/*"))]
        return {
            "features": features,
            "seconds": seconds,
            "after reading": seconds - reading,
            "peak": read_peak_memory(),
            "page": sum(file.stat().st_size for file in files),
            "open": time_browser(index) - time_browser(None),
        }


def time_browser(page: Path | None) -> float:
    """Seconds for Chromium to show a page (None: an empty one) and exit; the fastest of three."""
    browser = shutil.which("chromium")
    if browser is None:
        return float("nan")
    address = "about:blank" if page is None else page.as_uri()
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        shown = subprocess.run(
            [*command, "--virtual-time-budget=8000", address], capture_output=True, check=True
        )
        seconds.append(time.perf_counter() - begin)
        assert page is None or b'class="row"' in shown.stdout
    return min(seconds)


def run_alone(*arguments: object) -> dict[str, Any]:
    """Run this script with the arguments in its own process; returns its result."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--block", type=int, default=1, help="a low one makes reading quick")
    parser.add_argument("--grow", type=int, nargs="+", help="features of overviews to compare")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        tokens = options.tokens[0]
        if options.grow:
            result = measure_overview(tokens, options.grow[0])
        else:
            result = measure_survey(tokens, options.features, options.block)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    if options.grow:
        for features in options.grow:
            result = run_alone("--grow", features, "--tokens", options.tokens[0])
            console.print(
                f"{features:>9,} features  {result['seconds']:6.0f} s, "
                f"{result['after reading']:5.0f} s after reading  {result['peak'] / 1e9:5.2f} GB  "
                f"page {result['page'] / 1e6:5.0f} MB, open in {result['open']:.1f} s"
            )
        return
    peaks = []
    for tokens in options.tokens:
        result = run_alone(
            "--tokens", tokens, "--features", options.features, "--block", options.block
        )
        peaks.append(result["peak"])
        console.print(f"{result['tokens']:>10,} tokens  {result['peak'] / 1e9:.3f} GB")
    console.print(f"ratio of the last to the first: {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()

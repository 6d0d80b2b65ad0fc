"""Does memory grow with the amount of text? python benchmarks/collect_memory.py

A survey of 100,000 and one of 1,000,000 tokens, each in a process of its own, with an SAE of random
weights on the packaged LLM, of which a few percent of the features are active. Peak memory of both,
and the ratio; the aim is at most 1.1. Measured on two cores: 2.170 GB and 2.264 GB, ratio 1.043.

How the overview grows with the features:

    python benchmarks/collect_memory.py --tokens 131072 --grow 16384 32768 65536 131072

For each number the whole of `analyze.py run=...` in a process of its own, on a random LLM of
GPT-2's width (two blocks, so that reading is cheap) with SmolLM2's tokens. The SAE is a JumpReLU of
random directions with 64 active features a token, every hundredth a copy of another. Seconds in all
and after reading, peak memory, size of the page with what is beside it, seconds until Chromium
shows it.
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
# where the LLM and the SAE run over text: file -> functions
READING = {
    "collect.py": {"collect"},
    "scorecard.py": {"_measure_errors"},
    "held_out.py": {"_captured", "score_baseline", "score_splices"},
    "load.py": {"load_llm", "load_tokenizer"},
    "tokens.py": {"open_tokens"},
}


def measure(tokens: int, features: int, block: int) -> dict[str, Any]:
    """The peak memory of one survey in bytes."""
    from sae_lightning.analysis.subject import Subject
    from sae_lightning.analysis.survey.survey import survey
    from sae_lightning.llm.load import LLMConfig, read_llm_shape
    from sae_lightning.llm.sites import LayerConfig
    from sae_lightning.runs.config import Config
    from sae_lightning.sae import ARCHITECTURES, build
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
    sae = build(config.model, llm.width, llm.width).requires_grad_(False)
    subject = Subject(Path(), sae, config.layer.resolve_sites(llm.layers), config)
    found = survey(subject, subject.corpus.train, tokens=tokens)
    return {"tokens": found.features.statistics.tokens, "peak": peak()}


def peak() -> int:
    """Of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_llm(folder: Path) -> torch.Tensor:
    """Save an LLM, and give its activations [n, d] behind its first block."""
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
    """Save an SAE for activations like x [n, d]."""
    from sae_lightning.formats.export import save_sae
    from sae_lightning.sae import ARCHITECTURES, build

    kind = ARCHITECTURES["jumprelu"].config(name="jumprelu", features=features)
    sae = build(kind, WIDTH, WIDTH).requires_grad_(False)
    rows = torch.nn.functional.normalize(sae.W_dec)
    rows[1::100] = rows[::100][: len(rows[1::100])] + 0.01 * torch.randn(WIDTH)
    centred = x - x.mean(0)
    some = centred @ rows[:4096].T
    threshold = some.flatten().topk(int(some.numel() * ACTIVE / features)).values[-1]
    weights = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_dec": x.mean(0)}
    weights["b_enc"], weights["threshold"] = -(rows @ x.mean(0)), threshold.expand(features).clone()
    where = {"model_name": str(llm), "hook_name": "blocks.0.hook_resid_post"}
    (folder / "sae").mkdir(parents=True)
    save_sae(folder / "sae", sae, weights, where)


def grow(tokens: int, features: int) -> dict[str, Any]:
    """Make an SAE and its overview, and measure that."""
    from sae_lightning.analysis.overview import OverviewTask
    from sae_lightning.llm.load import LLMConfig
    from sae_lightning.llm.sites import LayerConfig
    from sae_lightning.stream.plays import PlaysConfig

    with tempfile.TemporaryDirectory() as place:
        run, llm = Path(place, "run"), Path(place, "llm")
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
        profile.runcall(task.answer, {"llm", "llm.name", "data", "layer"})
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
            "peak": peak(),
            "page": sum(file.stat().st_size for file in files),
            "open": opened(index) - opened(None),
        }


def opened(page: Path | None) -> float:
    """Seconds until a browser has shown a page and is gone; None for an empty one. The least of
    three."""
    browser = shutil.which("chromium")
    if browser is None:
        return float("nan")
    address = "about:blank" if page is None else page.as_uri()
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        shown = subprocess.run(
            [*command, "--virtual-time-budget=8000", address], capture_output=True, check=True
        )
        taken.append(time.perf_counter() - begin)
        assert page is None or b'class="row"' in shown.stdout
    return min(taken)


def alone(*arguments: object) -> dict[str, Any]:
    """What this script finds with the arguments in a process of its own."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--block", type=int, default=1, help="a low one is quick")
    parser.add_argument("--grow", type=int, nargs="+", help="features of overviews to compare")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        tokens = asked.tokens[0]
        if asked.grow:
            found = grow(tokens, asked.grow[0])
        else:
            found = measure(tokens, asked.features, asked.block)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    if asked.grow:
        for features in asked.grow:
            found = alone("--grow", features, "--tokens", asked.tokens[0])
            console.print(
                f"{features:>9,} features  {found['seconds']:6.0f} s, "
                f"{found['after reading']:5.0f} s after reading  {found['peak'] / 1e9:5.2f} GB  "
                f"page {found['page'] / 1e6:5.0f} MB, open in {found['open']:.1f} s"
            )
        return
    peaks = []
    for tokens in asked.tokens:
        found = alone("--tokens", tokens, "--features", asked.features, "--block", asked.block)
        peaks.append(found["peak"])
        console.print(f"{found['tokens']:>10,} tokens  {found['peak'] / 1e9:.3f} GB")
    console.print(f"ratio of the last to the first: {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()

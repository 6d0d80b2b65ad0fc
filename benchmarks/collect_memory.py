"""Does memory grow with the amount of text? python benchmarks/collect_memory.py

A survey of 100,000 and one of 1,000,000 tokens, each in a process of its own, with an SAE of random
weights on the packaged LLM, of which a few percent of the features are active. Peak memory of both,
and the ratio; the aim is at most 1.1. Measured on two cores: 2.170 GB and 2.264 GB, ratio 1.043.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from sae_lightning.terminal import console


def measure(tokens: int, features: int, block: int) -> None:
    """Print the peak memory of one survey in bytes."""
    from sae_lightning.analysis.subject import Subject
    from sae_lightning.analysis.survey.survey import survey
    from sae_lightning.llm.load import LLMConfig, shape
    from sae_lightning.llm.sites import LayerConfig
    from sae_lightning.runs.config import Config
    from sae_lightning.sae import ARCHITECTURES, build
    from sae_lightning.stream.plays import PlaysConfig

    topk = ARCHITECTURES["topk"]
    config = Config(
        llm=LLMConfig(name="smollm2", device="cpu"),
        data=PlaysConfig(),
        layer=LayerConfig(index=block),
        model=topk.config(name="topk", features=features, k=64),
        loss=topk.loss(),
    )
    llm = shape(config.llm)
    sae = build(config.model, llm.width, llm.width).requires_grad_(False)
    subject = Subject(Path(), sae, config.layer.within(llm.layers), config)
    found = survey(subject, subject.text.train, tokens=tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"tokens": found.features.statistics.tokens, "peak": peak}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--block", type=int, default=1, help="a low one is quick")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        measure(asked.tokens[0], asked.features, asked.block)
        return
    peaks = []
    for tokens in asked.tokens:
        command = [sys.executable, __file__, "--one", "--tokens", str(tokens)]
        command += ["--features", str(asked.features), "--block", str(asked.block)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        peaks.append(result["peak"])
        console.print(f"{result['tokens']:>10,} tokens  {result['peak'] / 1e9:.3f} GB")
    console.print(f"ratio of the last to the first: {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()

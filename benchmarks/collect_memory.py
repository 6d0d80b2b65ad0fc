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

import torch

from sae_lightning.terminal import console


def measure(tokens: int, features: int, block: int) -> None:
    """Print the peak memory of one survey in bytes."""
    from sae_lightning.analysis.subject import Subject
    from sae_lightning.analysis.survey.survey import survey
    from sae_lightning.llm.load import LLMConfig, load
    from sae_lightning.llm.sites import Kind, Site, Sites
    from sae_lightning.sae import ARCHITECTURES, build
    from sae_lightning.stream.documents import open_text
    from sae_lightning.stream.text import PlaysConfig
    from sae_lightning.stream.tokens import open_tokens

    llm = load(LLMConfig(name="smollm2"))
    width = llm.model.config.hidden_size
    sae = build(ARCHITECTURES["topk"].config(name="topk", features=features, k=64), width, width)
    site = Site(block, Kind.resid)
    subject = Subject(llm, sae.requires_grad_(False), Sites(site, site))
    text = open_tokens(open_text(PlaysConfig()), llm.tokenizer, context=128, seed=0)
    found = survey(subject, text.train, tokens=tokens)
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

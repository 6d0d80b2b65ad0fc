"""The held-out scorecard of a saved SAE."""

from pathlib import Path

from sae_lightning import scorecard
from sae_lightning.files import write_json
from sae_lightning.llm.load import LLM
from sae_lightning.llm.sites import Sites
from sae_lightning.sae import SAE
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.terminal import console, grid


def evaluate(run: Path, sae: SAE, llm: LLM, held_out: HeldOut, sites: Sites) -> scorecard.Scorecard:
    """Score the SAE of `run` as it was saved, print the card and write `analysis/evaluate.json`."""
    (card,) = scorecard.score([sae.to(llm.model.device)], held_out, *sites)
    target = run / "analysis" / "evaluate.json"
    write_json(target, card.scalars() | {"tokens": int(held_out.keep.sum())})
    console.print(grid(scorecard.rows(card.scalars()), title="on held-out text"))
    console.print(f"written to {target}")
    return card

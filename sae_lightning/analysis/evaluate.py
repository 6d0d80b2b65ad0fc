"""The held-out scorecard of a saved SAE."""

from pathlib import Path

from sae_lightning import scorecard
from sae_lightning.export import load_sae, write_json
from sae_lightning.llm.load import LLM
from sae_lightning.llm.sites import Site
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.terminal import console, grid


def evaluate(run: Path, llm: LLM, held_out: HeldOut, site: Site) -> scorecard.Scorecard:
    """Score the SAE in `run` as it was saved, print the card and write `analysis/evaluate.json`."""
    sae = load_sae(run).to(llm.model.device)
    card = scorecard.score(sae, held_out, site, site)
    target = run / "analysis" / "evaluate.json"
    write_json(target, card.scalars() | {"tokens": int(held_out.keep.sum())})
    console.print(grid(scorecard.rows(card.scalars()), title="on held-out text"))
    console.print(f"written to {target}")
    return card

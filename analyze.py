"""Look at what a trained SAE found: python analyze.py run=outputs/<day>/<time>"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from sae_lightning.analysis.evaluate import evaluate
from sae_lightning.cli import one_line_errors
from sae_lightning.config import read_job, register, typed
from sae_lightning.errors import UserError
from sae_lightning.export import load_sae
from sae_lightning.llm.load import load, shape
from sae_lightning.stream.documents import open_text
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.tokens import open_tokens

TASKS = {"evaluate": evaluate}


@hydra.main(version_base="1.3", config_path="conf", config_name="analyze")
def analyze(cfg: DictConfig) -> None:
    """Run one task on the SAE of one run folder, with the run's own LLM and held-out text."""
    with one_line_errors():
        asked = typed(cfg)
        if asked.task not in TASKS:
            raise UserError(f"task={asked.task}: no such task; choose from {', '.join(TASKS)}")
        folder = Path(asked.run)
        config = read_job(folder).config
        sae = load_sae(folder)
        site = config.layer.within(shape(config.llm).layers)
        text = open_text(config.data)
        llm = load(config.llm)
        held_out = HeldOut(
            llm,
            open_tokens(
                text, llm.tokenizer, context=config.data.context, seed=config.seed
            ).held_out,
            [site],
            tokens=asked.tokens or config.eval.tokens,
            loss_tokens=asked.tokens or config.eval.loss_tokens,
            max_norm=config.data.max_norm,
            batch=config.llm.batch,
            keep_special=config.data.keep_special,
        )
        TASKS[asked.task](folder, sae, llm, held_out, site)


if __name__ == "__main__":
    register()
    with one_line_errors():
        analyze()

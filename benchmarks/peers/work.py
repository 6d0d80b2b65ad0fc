"""The work that every tool is given: the same activations in the same order."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from sae_lightning.llm.load import load_llm
from sae_lightning.runs.config import Config
from sae_lightning.stream import open_text
from sae_lightning.stream.batches import BatchStream
from sae_lightning.stream.open_rows import open_rows
from sae_lightning.stream.tokens import open_tokens

NORM_BATCHES = 64  # for a tool's estimate of the scale: as many tokens as our own runs use


class Work(NamedTuple):
    """Training data and size of one SAE."""

    d_in: int
    """Width of an activation."""
    features: int
    """Features of the SAE."""
    batch: int
    """Tokens per update."""
    steps: int
    """Updates in the whole run."""
    seed: int
    """Seed of the SAE's initialisation."""
    layer: int
    """Block of the LLM whose output is read, from 0."""
    model_name: str
    """Name of the LLM."""
    hook_name: str
    """TransformerLens' name of the site."""
    batches: Callable[[], Iterator[Tensor]]
    """Starts the run's batches [batch, d_in] from the first: raw activations, float32."""

    def first_batches(self) -> Iterator[Tensor]:
        """First batches, to estimate a scale; training sees them again."""
        return islice(self.batches(), NORM_BATCHES)


def open_work(config: Config) -> Work:
    """Open the batches that a run of `config` would train on."""
    llm, trainer, data = load_llm(config.llm), config.trainer, config.data
    width = llm.model.config.get_text_config().hidden_size
    site = config.layer.resolve_sites(llm.model.config.get_text_config().num_hidden_layers).source

    tokens = open_tokens(open_text(data), llm.tokenizer, context=data.context, seed=config.seed)
    beginning = tokens.train.state_dict()

    def batches() -> Iterator[Tensor]:
        tokens.train.load_state_dict(beginning)
        rows = open_rows(config.llm, data, config.seed, llm, tokens.train, [site])
        stream = BatchStream(
            rows,
            batch=trainer.batch,
            total_batches=trainer.steps,
            pool=data.pool,
            seed=config.seed,
        )
        try:
            for batch in stream:
                yield batch[site].float()
        finally:
            stream.close()

    return Work(
        d_in=width,
        features=config.model.features,
        batch=trainer.batch,
        steps=trainer.steps,
        seed=config.seed,
        layer=site.layer,
        model_name=config.llm.name,
        hook_name=site.hook_name,
        batches=batches,
    )

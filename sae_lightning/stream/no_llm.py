"""The base class of the kinds of data that take no LLM: synthetic and activations."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.llm.load import NO_LLM, Dtype, LLMConfig
from sae_lightning.llm.sites import LayerConfig, Site
from sae_lightning.stream.source import DataSource


class NoLLMSource(DataSource):
    """Activations without an LLM and without text."""

    has_llm = False

    def check_settings(self, layer: LayerConfig) -> None:
        # the default of llm.dtype is auto, which becomes float32 before training
        dtype = Dtype.auto if self.llm.dtype is Dtype.auto else Dtype.float32
        defaults = LLMConfig(name=NO_LLM, dtype=dtype, device=self.llm.device)
        self.refuse_settings("llm", self.llm, defaults)

    def refuse_settings(self, group: str, config: Any, defaults: Any) -> None:
        """UserError for the first setting of a group that differs from its default."""
        values = asdict(config)
        for name, default in asdict(defaults).items():
            if values[name] != default:
                value = getattr(values[name], "name", values[name])  # an enum shows its name
                raise UserError(
                    f"{group}.{name}={value} has no meaning with {self.where}, whose "
                    "activations come from no LLM: leave it out"
                )

    def check_data(self, sites: Sequence[Site], batch: int) -> None:
        """Check nothing; to be overridden by data that has several sites or can run out."""

"""An LLM that ends with the deepest block that is read: what lies behind takes no memory."""

from torch import nn

from sae_lightning.llm.sites import decoder_stack


def cut(model: nn.Module, blocks: int) -> None:
    """Take everything after the first `blocks` blocks out of a causal LM.

    Its config stays: a block may look at how many there are in the whole (Gemma-3n's last ones
    share keys and values, others scale by their number), and has to do what it did there.
    """
    stack = decoder_stack(model)
    del stack[blocks:]
    model.kept_blocks = len(stack)


def without_head(model: nn.Module) -> nn.Module:
    """A causal LM whose LM head is gone; one that is its embedding too stays that."""
    model.set_output_embeddings(nn.Identity())
    return model


def cut_class(kind: type[nn.Module], blocks: int) -> type[nn.Module]:
    """A class of causal LMs whose models are cut before their weights are read: the other weights
    are left on the disk."""

    class Cut(kind):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            cut(self, blocks)

    # by these transformers finds out how weights are called in older files
    Cut.__name__, Cut.__module__ = kind.__name__, kind.__module__
    return Cut

"""Logits a few positions at a time: those of a whole batch are the largest tensor of an LLM.

    tokens -> body -> last hidden states [sequences, context, d]
                                            some of them [n, d] -> LM head -> logits [n, vocabulary]

Shapes: d = width of the residual stream.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sae_lightning.errors import UserError


def body(model: nn.Module, tokens: Tensor):
    """What a causal LM computes of tokens [sequences, context] before its head (transformers'
    output; its `last_hidden_state` is what the head reads)."""
    return body_of(model)(input_ids=tokens, use_cache=False)


def body_of(model: nn.Module) -> nn.Module:
    """The part of a causal LM that computes the last hidden states."""
    # transformers does not find those of Llama 4 and Mllama, and gives the whole
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def logits(model: nn.Module, output, hidden: Tensor) -> Tensor:
    """Logits [n, vocabulary] of last hidden states [n, d], with all that the family does behind its
    LM head (a soft cap in Gemma-2, a scale in Cohere). `output`: any of `body`, for its form.

    The model itself computes them, around a body that returns what it is given.
    """
    used: list[bool] = []

    def given(*_, **__):
        used.append(True)
        return type(output)(last_hidden_state=hidden[None])

    # OPT calls the second
    with _forward_of({body_of(model), model.get_decoder()} - {model}, given):
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        found = model(input_ids=tokens, use_cache=False).logits
    if not used:
        raise UserError(
            f"llm.name: cannot tell the LM head of {type(model).__name__} from what comes before "
            "it; set eval.loss_tokens=0, or choose another LLM"
        )
    return found[0]


@contextmanager
def _forward_of(modules: set[nn.Module], function: Callable) -> Iterator[None]:
    """Inside the block, `function` is called in place of these modules' own."""
    before = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module in modules:
            module.forward = function
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own

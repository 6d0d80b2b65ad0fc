"""Asking a language model a question and reading its answer."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLM
from sae_lightning.llm.quiet import quiet


class Reply(NamedTuple):
    """What a model answers, and the tokens that it took."""

    text: str
    tokens_in: int
    """Of the question, as the model was given it."""
    tokens_out: int
    """Of the answer."""


@torch.no_grad()
def reply(llm: LLM, question: str, tokens: int) -> Reply:
    """The likeliest answer, of at most `tokens` tokens: the same each time."""
    ids = _ids(llm.tokenizer, question).to(llm.model.device)
    asked = ids.shape[1]
    limit = getattr(llm.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and asked + tokens > limit:
        raise UserError(
            f"model={llm.name}: takes {limit:,} tokens, and a question of {asked:,} with an answer "
            f"of up to {tokens:,} is longer; ask less at a time, or use another model"
        )
    ending = llm.model.generation_config.eos_token_id
    padding = llm.tokenizer.pad_token_id
    if padding is None:
        padding = ending[0] if isinstance(ending, list) else ending
    with quiet():  # it warns of the sampling settings that some models come with
        ids = llm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=padding,
        )
    answer = ids[0, asked:]
    text = llm.tokenizer.decode(answer, skip_special_tokens=True)
    return Reply(text.strip(), asked, len(answer))


def _ids(tokenizer, question: str) -> Tensor:
    """[1, tokens] of the question in the model's chat format, or as plain text if it has none."""
    if tokenizer.chat_template is None:
        return tokenizer(f"{question}\n\nAnswer:", return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]

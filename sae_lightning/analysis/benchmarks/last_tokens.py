"""The activation at the last token of each text; at that token the LLM has read the whole text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lightning.analysis.subject import Subject
from sae_lightning.llm.capture import capture
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.vocabulary import check_ids, find_bos_id, find_separator_id
from sae_lightning.stream.flat import tokenise_documents
from sae_lightning.terminal import phase


@torch.no_grad()
def read_last_tokens(subject: Subject, texts: Sequence[str], context: int) -> Tensor:
    """Activations [texts, d_in] at the SAE's source, at the last token of each text, float32 on the
    CPU. A text that is longer than `context` tokens, BOS included, loses its first tokens."""
    bos, separator = find_bos_id(subject.tokenizer), find_separator_id(subject.tokenizer)
    with mute_libraries(), phase("tokenising the texts"):
        documents = tokenise_documents(subject.tokenizer, texts, separator)
    # without the separator at the end; the last context - 1 tokens, because BOS is added
    windows = [torch.from_numpy(tokens[:-1][1 - context :]).long() for tokens in documents]
    check_ids(subject.tokenizer, torch.cat(windows).numpy(), "sets")
    # texts of similar length share a batch, so that little is padding; the longest are read first
    waiting = sorted(range(len(texts)), key=lambda i: len(windows[i]))
    budget = subject.config.llm.batch * subject.config.data.context  # tokens, as in training
    site, activations = subject.sites.source, None
    with phase("reading labelled texts", total=len(texts)) as advance:
        while waiting:
            longest = 1 + len(windows[waiting[-1]])  # with BOS
            count = max(1, budget // longest)
            batch, waiting = waiting[-count:], waiting[:-count]  # indices of texts
            tokens = torch.full((len(batch), longest), separator)
            tokens[:, 0] = bos
            for sequence, i in zip(tokens, batch, strict=True):
                sequence[1 : 1 + len(windows[i])] = windows[i]
            last_positions = torch.tensor([len(windows[i]) for i in batch])  # BOS is at 0
            places = torch.arange(len(batch)) * longest + last_positions  # in the flattened batch
            captured = capture(subject.llm.model, tokens, [site], places)[site].float().cpu()
            if activations is None:
                activations = captured.new_empty(len(texts), captured.shape[1])
            activations[batch] = captured
            advance(len(batch))
    return activations

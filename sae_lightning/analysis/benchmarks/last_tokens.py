"""The activation at the last token of each text, which has seen the whole text."""

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
    CPU. Of a text longer than `context` tokens, BOS included, the last ones are read."""
    bos, separator = find_bos_id(subject.tokenizer), find_separator_id(subject.tokenizer)
    with mute_libraries(), phase("tokenising the texts"):
        documents = tokenise_documents(subject.tokenizer, texts, separator)
    windows = [torch.from_numpy(tokens[:-1][1 - context :]).long() for tokens in documents]
    check_ids(subject.tokenizer, torch.cat(windows).numpy(), "sets")
    # texts of one length together, so that little is padding
    order = sorted(range(len(texts)), key=lambda i: len(windows[i]))
    budget = subject.config.llm.batch * subject.config.data.context  # tokens, as in training
    site, x = subject.sites.source, None
    with phase("reading labelled texts", total=len(texts)) as advance:
        while order:
            longest = 1 + len(windows[order[-1]])
            first = -max(1, budget // longest)
            batch, order = order[first:], order[:first]
            tokens = torch.full((len(batch), longest), separator)
            tokens[:, 0] = bos
            for row, i in zip(tokens, batch, strict=True):
                row[1 : 1 + len(windows[i])] = windows[i]
            lengths = torch.tensor([len(windows[i]) for i in batch])
            last = torch.arange(len(batch)) * longest + lengths
            rows = capture(subject.llm.model, tokens, [site], last)[site].float().cpu()
            x = rows.new_empty(len(texts), rows.shape[1]) if x is None else x
            x[batch] = rows
            advance(len(batch))
    return x

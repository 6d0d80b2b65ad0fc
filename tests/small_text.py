"""Synthetic text: a tokenizer with one token per byte, and documents of countable tokens."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

STYLES = ["indexed", "streamed"]
BOS, SEPARATOR = 256, 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=8
    )


def story(seed: int, documents: int = 25) -> list[str]:
    """Documents of 0 to 30 letters, some of them longer than several windows, some empty."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh", k=rng.randrange(31))) for _ in range(documents)]

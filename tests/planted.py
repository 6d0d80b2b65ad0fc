"""A tiny LLM and an SAE with one known feature, both on disk.

    reads   token "wizard" or "potion"   ->  feature 3  ->  writes the token "fox"

The LLM's blocks add nothing, so that its residual stream is the embedding. Two of its directions
are reserved: only "wizard" and "potion" have the first, only the logit of "fox" reads the second.
"""

from pathlib import Path

import torch
import transformers
from tiny_llm import WIDTH, tiny_config, tiny_tokenizer

from sae_lightning.formats.saved_format import save_sae
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.sae import ARCHITECTURES, build_sae

FEATURE, FEATURES = 3, 32
READS, WRITES = (" wizards", " potion"), " fox"


def token(text: str) -> int:
    """The id of a text that is a single token."""
    (token_id,) = tiny_tokenizer().encode(text, add_special_tokens=False)
    return token_id


def save_planted(folder: Path) -> tuple[Path, Path]:
    """Write LLM and SAE below `folder` and return their folders."""
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.tie_word_embeddings = False
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        embedding, unembedding = (
            m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        embedding.normal_()[:, :2] = 0
        unembedding.normal_(0, 0.3)[:, :2] = 0
        embedding[[token(text) for text in READS], 0] = 3
        unembedding[token(WRITES), 1] = 3
    with mute_libraries():
        model.save_pretrained(folder / "llm")
        tiny_tokenizer().save_pretrained(folder / "llm")
    config = ARCHITECTURES["relu"].config(features=FEATURES, start_bias=0.0)
    sae = build_sae(config, WIDTH, WIDTH)
    with torch.no_grad():
        sae.W_enc[:2], sae.W_dec[:, :2] = 0, 0
        sae.W_enc[:, FEATURE] = torch.eye(WIDTH)[0]
        sae.b_enc[FEATURE] = -1
        sae.W_dec[FEATURE] = torch.eye(WIDTH)[1]
    metadata = {"model_name": str(folder / "llm"), "hook_name": "blocks.1.hook_resid_post"}
    metadata |= {"context_size": 16}
    save_sae(folder / "sae", sae, sae.weights(), metadata)
    return folder / "llm", folder / "sae"

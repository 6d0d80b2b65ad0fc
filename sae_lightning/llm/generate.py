"""Text generation: answers, and continuations with an activation replaced.

    BOS  There  once  was    a  cat  who ...
     .     *      *    *     *   *    *         * = replaced; BOS is left as it is

Shapes: sequences = continuations of one prompt; d = width of a site.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import replace_activations
from sae_lightning.llm.load import LLM
from sae_lightning.llm.placement import find_computing_device
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.sites import SitePair
from sae_lightning.llm.vocabulary import check_ids, find_bos_id, find_separator_id


class Sampling(NamedTuple):
    """How the next token is chosen from p = softmax(logits / temperature)."""

    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose total probability is at least this (nucleus)."""
    seed: int = 0


GREEDY = Sampling()


def encode_prompt(tokenizer: Any, prompt: str, new_tokens: int, context: int | None) -> Tensor:
    """Token ids [n] of BOS and the prompt. UserError if the prompt is empty, has a token without an
    embedding, or leaves no room for `new_tokens` more in `context` (None: no limit)."""
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if not ids:
        raise UserError("prompt=: empty; give the words that the text begins with")
    if context and 1 + len(ids) + new_tokens > context:
        raise UserError(
            f"prompt: its {len(ids):,} tokens and tokens={new_tokens} new ones are more than the "
            f"{context - 1:,} that the LLM can read; shorten the prompt or give fewer tokens"
        )
    check_ids(tokenizer, ids, "prompt")
    return torch.tensor([find_bos_id(tokenizer), *ids])


def read_context_length(model: nn.Module) -> int | None:
    """The longest sequence that the LLM takes, in tokens; None if its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def generate(
    llm: LLM,
    prompt: Tensor,
    new_tokens: int,
    sites: SitePair,
    function: Callable[[Tensor, Tensor], Tensor],
    sequences: int,
    sampling: Sampling = GREEDY,
    cache: bool = True,
) -> list[Tensor]:
    """Continue `prompt` [n], which begins with BOS, `sequences` times by up to `new_tokens` tokens.

    function(x, y) replaces y, the activation at the target; x is the activation at the source.
    x, y and the result are float32 [sequences, tokens, d]: first for all tokens of the prompt, then
    for each new token. Sequences share the Gumbel noise g of each new token (argmax(log p + g)
    samples p), so only `function` makes them differ. Each is cut before its first new separator.
    With cache=False, or if the LLM has no KV cache, x and y are always of all tokens.
    """
    from transformers import GenerationConfig

    end_id = find_separator_id(llm.tokenizer)
    ids = prompt.to(find_computing_device(llm.model)).expand(sequences, -1)

    def continue_prompt(use_cache: bool) -> Tensor:
        replace = _apply_after_bos(function, sequences)
        with mute_libraries(), replace_activations(llm.model, *sites, replace):
            return llm.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    use_cache=use_cache,
                    eos_token_id=end_id,
                    pad_token_id=end_id,
                ),
                logits_processor=_make_processors(sampling),
            )

    try:
        generated = continue_prompt(cache)
    except ValueError:  # xLSTM and hybrids without an attention layer cannot use a KV cache
        generated = continue_prompt(False)
    return [_cut_at_end(sequence, len(prompt), end_id) for sequence in generated.cpu()]


def _cut_at_end(sequence: Tensor, prompt_length: int, end_id: int) -> Tensor:
    """`sequence` up to the first `end_id` after the prompt, exclusive."""
    ends = (sequence[prompt_length:] == end_id).nonzero()
    return sequence[: prompt_length + int(ends[0])] if len(ends) else sequence


def _apply_after_bos(
    function: Callable[[Tensor, Tensor], Tensor], sequences: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """`function`, but BOS keeps its activation."""

    def apply(x: Tensor, y: Tensor) -> Tensor:
        shape = y.shape
        # OPT's MLP returns [sequences * tokens, d]
        x, y = x.view(sequences, -1, x.shape[-1]), y.view(sequences, -1, y.shape[-1])
        changed = function(x.float(), y.float()).to(y.dtype)
        # with a KV cache, y of a new token is [sequences, 1, d]; a prompt has at least two tokens
        if y.shape[1] > 1:
            changed = torch.cat([y[:, :1], changed[:, 1:]], dim=1)
        return changed.view(shape)

    return apply


def _make_processors(sampling: Sampling) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Logits processors that turn greedy decoding into sampling (Gumbel-max)."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return []
    generator = torch.Generator().manual_seed(sampling.seed)

    def draw(ids: Tensor, logits: Tensor) -> Tensor:
        noise = torch.rand(logits.shape[-1], generator=generator, dtype=torch.float64)
        return logits - (-noise.log()).log().to(logits)

    warpers = TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)
    return [*warpers, draw]


@torch.no_grad()
def compute_surprisal(model: nn.Module, ids: Tensor) -> Tensor:
    """-log p [n - 1] in nats of each token of `ids` [n] but the first, given all before it."""
    batch = ids[None].to(find_computing_device(model))
    logits = model(input_ids=batch, use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, ids[1:].to(logits.device), reduction="none").cpu()


class Reply(NamedTuple):
    """The answer of a model to a question."""

    text: str
    tokens_in: int
    """Number of tokens of the question, as formatted for the model."""
    tokens_out: int
    """Number of tokens of the answer."""


@torch.no_grad()
def reply(llm: LLM, question: str, max_tokens: int) -> Reply:
    """Have the LLM answer `question` in at most `max_tokens` tokens, by greedy decoding. UserError
    if the chat template fails, or question and answer may exceed what the LLM can read."""
    tokenizer, context = llm.tokenizer, read_context_length(llm.model)
    if tokenizer.chat_template is None:
        inputs = tokenizer(f"{question}\n\nAnswer:", return_tensors="pt")
    else:
        messages = [{"role": "user", "content": question}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        try:
            inputs = tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template is code that comes with the model
            raise UserError(
                f"explainer={llm.name}: its chat template fails ({error}); use another"
            ) from error
    ids = inputs["input_ids"].to(find_computing_device(llm.model))
    check_ids(tokenizer, ids[0].cpu().numpy(), f"explainer={llm.name}")
    length = ids.shape[1]
    if context and length + max_tokens > context:
        raise UserError(
            f"explainer={llm.name}: takes {context:,} tokens, and a question of {length:,} with an "
            f"answer of up to {max_tokens:,} is longer; ask less at a time, or use another"
        )
    with mute_libraries():  # transformers warns of the sampling settings of some models
        generated = llm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
    answer = generated[0, length:]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return Reply(text.strip(), length, len(answer))

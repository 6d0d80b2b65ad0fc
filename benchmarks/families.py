"""Which sites of which families of causal LMs can be read? Writes docs/models.md.

python benchmarks/families.py                # all families; writes docs/models.md anew
python benchmarks/families.py gpt2 llama     # these alone; prints their verdicts
"""

import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from textwrap import fill

import torch
import transformers
from command import run_command
from tiny_families import WIDTH, list_families, save_tiny
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture, replace_activations
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.pretrained import read_config, read_model
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.sites import Kind, Site, find_decoder_stack
from sae_lightning.terminal import console, phase

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
RIGHT, WRONG = "right", "WRONG"


def check_family(family: str) -> dict[Kind, str] | str:
    """Check each site of a family; returns one verdict per site, or one if the family is refused.

    ValueError: transformers cannot build a tiny model of it, or this does not run.
    """
    with tempfile.TemporaryDirectory() as name, mute_libraries():
        config = LLMConfig(name=name, device="cpu")
        try:
            save_tiny(family, Path(name))
        except Exception as error:
            raise ValueError(str(error)) from error
        try:
            hf_config, cpu = read_config(config, Path(name)), torch.device("cpu")
            model = read_model(config, Path(name), hf_config, None, torch.float32, cpu)
            model.eval().requires_grad_(False)
            find_decoder_stack(model)
        except UserError as error:
            return _shorten(error)
        except Exception as error:
            return f"{WRONG}: {type(error).__name__} {' '.join(str(error).split())[:90]}"
        try:
            _compute_logits(model, torch.full((2, 8), 2))
        except Exception as error:
            raise ValueError(f"the tiny model does not run: {error}") from error
        return {kind: _check_kind(model, kind) for kind in Kind}


# part of an error message -> the verdict
REASONS = {
    "both directions": "reads in both directions",
    "takes an image": "takes an image with every text",
    "encoder-decoder": "an encoder-decoder",
    "cannot tell which part": "no such module",
    "does not just add": "no plain sum",
    "residual streams": "several streams",
    "for text without images": "not run on text",
    "not one row for each": "not a row a token",
    "no list of": "no list of blocks",
    "weights are missing": "weights are missing",
    "num_hidden_layers": "no text decoder",
}


def _shorten(error: UserError) -> str:
    return next((short for long, short in REASONS.items() if long in str(error)), str(error))


def _check_kind(model: nn.Module, kind: Kind) -> str:
    """Check all blocks but the first: `right`, why the site is refused, or what is wrong."""
    counts: dict[str, int] = {}
    for layer in range(1, len(find_decoder_stack(model))):
        try:
            verdict = RIGHT if _is_right(model, Site(layer, kind)) else WRONG
        except UserError as error:
            verdict = _shorten(error)
        except Exception as error:
            verdict = f"{WRONG}: {type(error).__name__} {' '.join(str(error).split())[:90]}"
        counts[verdict] = counts.get(verdict, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items())


@torch.no_grad()
def _is_right(model: nn.Module, site: Site) -> bool:
    """Whether the activation at `site` passes the checks of docs/models.md."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 60, (2, 8), generator=generator)
    before, after = Site(site.layer - 1, Kind.resid), Site(site.layer, Kind.resid)
    value = _capture_site(model, tokens, site)
    changed = tokens.clone()
    changed[:, -1] += 1
    if not _is_close(_capture_site(model, changed, site)[:, :-1], value[:, :-1]):
        return False  # it depends on a later token
    logits = _compute_logits(model, tokens)
    replaceable = value.shape == (2, 8, WIDTH) and all(
        _is_close(_replace_and_compute_logits(model, tokens, site, replacement), logits) is same
        for replacement, same in ((lambda y: y, True), (torch.zeros_like, False))
    )
    if site.kind in (Kind.resid, Kind.mlp_in):
        return replaceable
    end = _capture_site(model, tokens, after)
    try:
        other_branch = _capture_site(model, tokens, Site(site.layer, _OTHER[site.kind]))
    except UserError:  # compare with the output of the block without this branch
        with replace_activations(model, site, site, lambda x, y: torch.zeros_like(y)):
            end_without = _capture_site(model, tokens, after)
        return replaceable and _is_close(end - value, end_without)
    beginning = _capture_site(model, tokens, before)
    return replaceable and _is_close(beginning + value + other_branch, end)


_OTHER = {Kind.attn: Kind.mlp, Kind.mlp: Kind.attn}


def _capture_site(model: nn.Module, tokens: Tensor, site: Site) -> Tensor:
    return capture(model, tokens, [site])[site]


def _compute_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def _replace_and_compute_logits(
    model: nn.Module, tokens: Tensor, site: Site, replacement: Callable[[Tensor], Tensor]
) -> Tensor:
    with replace_activations(model, site, site, lambda x, y: replacement(y)):
        return _compute_logits(model, tokens)


def _is_close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-3 * b.norm())


def check_families(names: list[str] | None = None) -> dict[str, dict[Kind, str] | str | None]:
    """Family -> what `check_family` returns; None if no tiny model of it can be built."""
    verdicts = {}
    with phase("families", total=len(names or list_families())) as advance:
        for family in names or list_families():
            try:
                verdicts[family] = check_family(family)
            except ValueError:
                verdicts[family] = None
            advance(1)
    return verdicts


def format_page(rows: dict[str, dict[Kind, str] | str | None]) -> str:
    """Format docs/models.md from the verdicts of all families."""
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    lines, refusals, not_built = [], {}, []
    for family, verdict in rows.items():
        name = f"{family} (images too)" if family in images else family
        if verdict is None:
            not_built.append(family)
        elif isinstance(verdict, str):
            refusals.setdefault(verdict, []).append(family)
        else:
            lines.append(f"| {name} | {' | '.join(verdict[kind] for kind in ORDER)} |")
    right = sum(
        cells[kind] == RIGHT for cells in rows.values() if isinstance(cells, dict) for kind in Kind
    )
    refused = "\n".join(
        fill(f"- {why}: {', '.join(names)}", 100, subsequent_indent="  ", break_on_hyphens=False)
        for why, names in sorted(refusals.items())
    )
    return PAGE_TEXT.format(
        date=date.today(),
        version=transformers.__version__,
        families=len(lines),
        right=right,
        cells=len(lines) * len(Kind),
        header=" | ".join(kind.value for kind in ORDER),
        rule="---|" * len(ORDER),
        rows="\n".join(lines),
        refused=refused,
        not_built=fill(", ".join(not_built), 100, break_on_hyphens=False),
    )


ORDER = (Kind.resid, Kind.attn, Kind.mlp, Kind.mlp_in)
PAGE_TEXT = """\
# Language models

Which LLMs SAEs can be trained on, and at which sites. `llm.name` takes a causal language model that
transformers loads, from the hub or a folder. What matters is not its size but its *family*, the
`model_type` in its `config.json`. `python benchmarks/families.py` writes this page: it builds a
tiny model of every family with random weights, loads it as a run does, and checks each site in all
blocks but the first. On {date} with transformers {version},
{right} of {cells} cells of {families} families are right.

The sites of block i (`layer.source`, `layer.target`) are:

- `resid`: the block's output, which the next block reads.
- `attn`, `mlp`: what this branch adds to the residual stream,
  `resid(i) = resid(i-1) + attn(i) + mlp(i)`. Where a block adds a fixed multiple of what its branch
  returns (Granite, MiniCPM-3), that multiple is what SAEs read and are exported for.
- `mlp_in`: the input of the MLP, which is the residual stream after the MLP's norm.

At each site it is checked that no activation depends on later tokens, that replacing an activation
by itself changes no logit, and that replacing it by zeros does.

A cell says `right`, or why the site is refused. A run at such a site stops before it trains, with
one line that gives the reason:

| in the cell | why |
|---|---|
| no such module | none of the block's modules is this branch alone (Mamba, BLOOM) |
| no plain sum | a third branch (Falcon-H1), a stream that is scaled (Gemma-4) or normed (GPT-1) |
| several streams | blocks pass on several residual streams that they mix (Gemma-3n, DeepSeek-V4) |
| not run on text | this block waits for an image |
| not a row a token | the activation does not have exactly one row for each token |
| 2 right, 1 ... | blocks differ, as in hybrid models: 2 of the three blocks are right |

Families marked *images too* also take images. Only their text decoder (embedding, blocks and
head) is used; give them text as to any LLM. The image encoder is loaded but not used.

| family | {header} |
|---|{rule}
{rows}

Refused as a whole, all but the last without reading a weight:

{refused}

Not tried, because transformers needs another package for them, or because smaller numbers in the
config do not make the model tiny:

{not_built}
"""


def main(names: list[str]) -> None:
    verdicts = check_families(names)
    if names:
        for family, verdict in verdicts.items():
            console.print(family, "not built" if verdict is None else verdict)
    else:
        PAGE.write_text(format_page(verdicts))
        console.print(f"wrote {PAGE}")


if __name__ == "__main__":
    run_command(main)

"""Warm starts: a head takes over the weights of a saved SAE and, if it was saved, Adam's state."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from sae_lightning.errors import UserError, is_out_of_memory
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.formats.pickles import load_tensors
from sae_lightning.formats.saelens import OWN_KEY
from sae_lightning.formats.trained_on import check_metadata
from sae_lightning.llm.load import NO_LLM
from sae_lightning.sae import SAE
from sae_lightning.sae.base import SMALLEST_NORM
from sae_lightning.sae.initial import rescale_strengths
from sae_lightning.stream.states import ANY_COUNT, expect
from sae_lightning.training.head import Head
from sae_lightning.training.settings import locate_checkpoint

STAYED_COSINE = 0.9  # of decoder rows at the start and now; above it, a feature has stayed
# Settings in which a run must agree with the one it starts from for Adam's moments to fit.
ADAM_SETTINGS = (
    "llm.name",
    "layer.index",
    "layer.source",
    "layer.target",
    "callbacks.normalize.mode",
    "model.decoder_norm",
    "model.fixed_norm",
    "model.control",  # frozen weights have no moments
)
NORMALISATION = ("in_mean", "in_scale", "out_mean", "out_scale")


@torch.no_grad()
def start_head(head: Head, optimizer: Optimizer) -> str:
    """Give a new head, whose normalisation has been measured, the weights of the SAE that it starts
    from; returns one line about what was taken over.

    The SAE takes raw activations, so its weights are converted to the head's units. Its features
    come first; those that only the head has keep their random start. If the SAE lies in a run's
    folder and the settings agree, Adam's moments are taken over, too, with the normalisation that
    they belong to.
    """
    start_sae, checkpoint = load_sae(head.start), _open_checkpoint(head.start)
    differing_name = _find_differing_setting(head, checkpoint["settings"]) if checkpoint else None
    with_adam = checkpoint is not None and differing_name is None
    if with_adam:
        try:
            _take_normalisation(head, checkpoint["state_dict"])
            _take_moments(head, start_sae, checkpoint["optimizer_states"][0], optimizer)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _refuse_checkpoint(head.start, error) from error
    _take_weights(head, start_sae, keep_norms=with_adam)
    features = len(start_sae.W_dec)
    start_rows = head.sae.split.slice(normalize(start_sae.W_dec))
    head.start_rows[: len(start_rows)] = start_rows
    line = f"starting from {head.start}: {features:,} features"
    if control := check_metadata(start_sae.metadata, head.start).get("model.control"):
        line += f" of a control ({control}), which trains on as an SAE"
    if new := head.sae.config.features - features:
        line += f", and {new:,} new ones"
    if with_adam:
        line += ", with the normalisation and Adam's moments of its checkpoint"
    elif differing_name:
        line += f"; Adam starts anew, because {differing_name} is not that of its checkpoint"
    return line


def _take_weights(head: Head, start_sae: SAE, keep_norms: bool) -> None:
    """Load the weights of `start_sae`, in the head's units, into the head's first features. Unless
    `keep_norms`, decoder rows are rescaled by `_find_factors`."""
    sae = head.sae
    in_mean, in_scale, out_mean, out_scale = (
        getattr(head, name).cpu().double() for name in NORMALISATION
    )
    # `fold` converts to raw activations; with the inverse of the normalisation, it converts back
    weights = start_sae.fold(
        -in_mean / in_scale, 1 / in_scale, -out_mean / out_scale, 1 / out_scale
    )
    if not keep_norms:
        weights = rescale_strengths(weights, _find_factors(head, start_sae, weights["W_dec"]))
    random_weights = sae.weights()
    for name, dim in sae.split_dims.items():
        if name in weights:
            rank_part = sae.split.slice(weights[name], dim)
            weights[name] = random_weights[name].to("cpu", copy=True)
            weights[name].narrow(dim, 0, rank_part.shape[dim]).copy_(rank_part)
            if name == "threshold" and sae.features_compete:  # one threshold for all features
                weights[name].fill_(rank_part[0])
    sae.load_weights(weights)


def _find_factors(head: Head, start_sae: SAE, W_dec: Tensor) -> Tensor:
    """Find the factors [features] by which the strengths of `start_sae` are multiplied and its
    decoder rows W_dec [features, d_out], in the head's units, are divided.

    With fixed norms, each row gets the norm `decoder_norm`. Otherwise, the rows of our own SAEs
    keep their norms. A row of another tool's SAE is divided by its norm or, if the head's features
    compete, by the mean norm of the rows, so that the order of strengths stays.
    """
    config, norms = head.sae.config, W_dec.norm(dim=1)
    is_nonzero = norms > SMALLEST_NORM  # rows of zeros get the mean norm's factor
    mean = norms[is_nonzero].mean()
    if config.fixed_norm:
        return torch.where(is_nonzero, norms, mean) / config.decoder_norm
    if OWN_KEY in start_sae.metadata:
        return torch.ones_like(norms)
    if head.sae.features_compete:
        return mean.expand_as(norms)
    return torch.where(is_nonzero, norms, mean)


def _open_checkpoint(address: str) -> dict[str, Any] | None:
    """The checkpoint of the run whose last SAE is at `address`, mmapped; None if there is none."""
    folder = Path(address)
    path = locate_checkpoint(folder.parent if folder.name == "sae" else folder)
    if not path.is_file():
        return None
    try:
        checkpoint = load_tensors(path)
        form = {"settings": dict, "state_dict": dict, "optimizer_states": list}
        expect(checkpoint, form, "checkpoint")
    except Exception as error:  # a damaged file may raise anything
        if is_out_of_memory(error):
            raise
        raise _refuse_checkpoint(address, error) from error
    return checkpoint


def _refuse_checkpoint(address: str, error: Exception) -> UserError:
    """The UserError for a damaged checkpoint of the SAE at `address`."""
    reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
    return UserError(
        f"model.start={address}: its checkpoint is damaged ({reason}); give {address}/sae, copied "
        "to another folder, to start from the weights alone"
    )


def _find_differing_setting(head: Head, settings: dict[str, Any]) -> str | None:
    """Find the first setting in which head and checkpoint (`settings`) differ so that Adam's
    moments do not fit; None if there is none."""
    names = ADAM_SETTINGS
    if head.settings.get("llm.name") == NO_LLM:  # then `data` determines the activations
        names += tuple(name for name in head.settings | settings if name.startswith("data."))
    return next((name for name in names if head.settings.get(name) != settings.get(name)), None)


def _take_normalisation(head: Head, state: dict[str, Tensor]) -> None:
    """Copy the means and scales from a checkpoint's `state_dict`."""
    for name in NORMALISATION:
        buffer, value = getattr(head, name), state[f"heads.0.{name}"]
        expect(value, buffer.cpu(), name)
        buffer.copy_(value)


def _take_moments(head: Head, start_sae: SAE, adam: dict[str, Any], optimizer: Optimizer) -> None:
    """Copy Adam's moments of the features of `start_sae`; the moments of new features are 0."""
    sae = head.sae
    parameters, start_parameters = dict(sae.named_parameters()), dict(start_sae.named_parameters())
    names = [name for group in head.group_parameters() for name in group]
    for index, name in enumerate(names):
        state, parameter = adam["state"][index], parameters[name]
        moment_like = start_parameters[name].detach()  # has the moments' shape and dtype
        form = {"step": torch.empty(()), "exp_avg": moment_like, "exp_avg_sq": moment_like}
        expect(state, form, name)
        head.adam_steps = int(state["step"])
        expect(head.adam_steps, ANY_COUNT, "Adam's step")
        optimizer.state[parameter] = {"step": state["step"].to(parameter.device, copy=True)}
        for key in ("exp_avg", "exp_avg_sq"):
            moment = torch.zeros_like(parameter)
            if name in sae.split_dims:
                dim = sae.split_dims[name]
                rank_part = sae.split.slice(state[key], dim)
                moment.narrow(dim, 0, rank_part.shape[dim]).copy_(rank_part)
            else:
                moment.copy_(state[key])
            optimizer.state[parameter][key] = moment


@torch.no_grad()
def count_fates(head: Head, fires: Tensor) -> dict[str, int]:
    """Count the features by what became of them since the warm start: whether they fired on
    held-out data at the start (`head.start_fired`; never if the start lacks the feature), and fire
    there now (`fires` [features] bool, of all ranks):

        fired, fires            stayed, if the cosine of its decoder rows then and now exceeds
                                STAYED_COSINE; otherwise moved
        fired, does not fire    died
        never fired, fires      born
        neither                 silent
    """
    split = head.sae.split
    rows, start_rows = normalize(head.sae.W_dec), normalize(head.start_rows.float())
    is_close = (split.join((rows * start_rows).sum(dim=1)) > STAYED_COSINE).cpu()
    fired, fires = split.join(head.start_fired).cpu() > 0, fires.cpu()
    fates = {
        "stayed": fired & fires & is_close,
        "moved": fired & fires & ~is_close,
        "died": fired & ~fires,
        "born": ~fired & fires,
        "silent": ~fired & ~fires,
    }
    return {name: int(features.sum()) for name, features in fates.items()}

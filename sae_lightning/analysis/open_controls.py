"""Opens the SAEs to compare an SAE with: the controls in its sweep, or any other SAE."""

from sae_lightning.analysis.subject import Subject, open_subject
from sae_lightning.errors import UserError
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.runs.find_controls import find_controls
from sae_lightning.runs.jobs import CONFIG_FILE
from sae_lightning.sae import SAE
from sae_lightning.sae.controls import Control


def open_controls(subject: Subject, control: str | None, *, limit: int | None) -> dict[str, SAE]:
    """Open the SAEs that `control` names, on the device of `subject`: name -> SAE.

    control: a kind of control in the sweep of `subject`, `all` for all kinds, or any SAE that
    analyze.py opens. None: the first `limit` kinds in the sweep, in the order of `Control`, or all
    kinds if `limit` is None. UserError: there is no such SAE, or it has another LLM, site or kind
    of data."""
    if control not in (None, "all", *Control.__members__):
        return _open_named(subject, control)
    folders = {}
    if (subject.folder / CONFIG_FILE).is_file() and subject.config.model.control is None:
        folders = find_controls(subject.folder)
    kinds = [kind for kind in Control if kind in folders and control in (None, "all", kind.name)]
    if not kinds and control is not None:
        others = ", ".join(kind.name for kind in folders) or "none"
        raise UserError(
            f"control={control}: the sweep of {subject.run} has no such control (it has {others}); "
            "train controls with sweep.controls=true, or give the folder of an SAE"
        )
    if control is None:
        kinds = kinds[:limit]
    saes = {kind.name: load_sae(folders[kind]) for kind in kinds}
    return {name: sae.to(subject.device) for name, sae in saes.items()}


def _open_named(subject: Subject, control: str) -> dict[str, SAE]:
    """Open the SAE at a folder or hub address, named after its kind of control or its folder."""
    config = subject.config
    settings = {"llm": config.llm, "data": config.data, "layer": config.layer, "seed": config.seed}
    other = open_subject(control, settings)
    site, other_site = (
        f"{opened.sites} of {opened.config.llm.name}, {opened.config.data_source.origin}"
        for opened in (subject, other)
    )
    if site != other_site:
        raise UserError(
            f"control={control}: it is an SAE of {other_site}, but {subject.run} of {site}; give "
            "one of the same site"
        )
    kind = other.config.model.control
    return {kind.name if kind else other.folder.name: other.sae.to(subject.device)}

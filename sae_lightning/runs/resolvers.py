"""Names that presets and folders take from other settings, as resolvers of conf/config.yaml."""

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from sae_lightning.sae import ARCHITECTURES


def pick_loss_preset(model: str) -> str:
    """The `loss` preset for a `model` preset: the preset with the same name or, if there is none,
    the preset of the model's architecture."""
    loader = GlobalHydra.instance().config_loader()
    exists = loader.repository.config_exists
    if exists(f"loss/{model}") or not exists(f"model/{model}"):  # Hydra reports an unknown name
        return model
    own = loader.load_configuration(f"model/{model}", [], RunMode.RUN)
    name = OmegaConf.select(own, "model.name", default="relu")
    return name if name in ARCHITECTURES else "relu"  # Config reports an unknown name


def name_job_folder(swept: str, number: int) -> str:
    """`hydra.sweep.subdir`: the job's swept settings, or its number if nothing is swept."""
    name = swept.replace("/", "_").encode()
    if len(name) > 200:  # file systems allow 255 bytes; the number keeps names distinct
        return name[:190].decode(errors="ignore") + f"_{number}"
    return name.decode() or str(number)

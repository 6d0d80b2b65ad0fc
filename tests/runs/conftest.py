"""Hydra, started on conf/."""

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from sae_lightning.runs.config import find_conf_folder
from sae_lightning.runs.schemas import register_schemas


@pytest.fixture(scope="module")
def hydra():
    """Hydra's loader of configs; `compose` works as long as it lives."""
    register_schemas()
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()

"""Our defaults for `hydra/sweeper=optuna` (after pip install -e ".[optuna]").

python train.py -m hydra/sweeper=optuna 'loss.l1=tag(log,interval(1e-4,1e-2))' sweep.l0=64
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin


class OptunaDefaults(SearchPathPlugin):
    """Replaces the defaults of Optuna's sweeper, which would minimise the objective.

    Hydra calls `manipulate_search_path` after all plugins have stored their configs and before it
    composes one. A preset in conf/ could not replace the defaults, because Hydra refuses a preset
    with the name of a plugin's config.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Overwrite the plugin's config with ours."""
        try:
            from hydra_plugins.hydra_optuna_sweeper.config import (
                OptunaSweeperConf,
                TPESamplerConfig,
            )
        except ImportError:  # the extra is not installed
            return
        search = OptunaSweeperConf(
            direction="maximize",  # sweep.objective=-kl minimises KL
            n_trials=20,
            n_jobs=5,  # trials chosen at once, to share a pass of the LLM
            max_failure_rate=1.0,  # a diverged SAE is a failed trial and does not end the search
        )
        store = ConfigStore.instance().store
        store(group="hydra/sweeper", name="optuna", node=search)
        store(group="hydra/sweeper/sampler", name="tpe", node=TPESamplerConfig(seed=0))

"""What TensorBoard shows of runs, read from its own HTTP server."""

import pytest
from board import open_board
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from sae_lightning.training.logging import HEADLINE, HeadLog, HParams

RELU = {"model.name": "relu", "loss.l1": 0.01, "optim.lr": 1e-3}
DENSE = {"model.name": "dense", "optim.lr": 1e-3}


# of what TensorBoard brings with it
pytestmark = pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")


@pytest.mark.slow
@pytest.mark.parametrize("headline", ["ce_recovered", "recovered"])
@pytest.mark.parametrize("tab", ["timeseries", "scalars"])
def test_the_first_curves_are_l0_ev_and_the_headline_of_the_data(tmp_path, headline, tab):
    """TensorBoard sorts tags as text; what scripts read is there under its own name too."""
    last = f"held_out/{headline}"
    log = HeadLog(tmp_path, HParams(DENSE, DENSE, headline=[*HEADLINE, last]), None)
    names = "data/epoch", "train/dead", "held_out/a", *HEADLINE[:2], last, "At/z"
    log.add_scalars(dict.fromkeys(names, 0.5), 10)
    log.close()
    answer = open_board(tmp_path).get(f"/data/plugin/{tab}/tags").json
    answer = answer["scalars"]["runTagInfo"] if tab == "timeseries" else answer
    (tags,) = map(sorted, answer.values())
    first = ["At a glance/1 l0", "At a glance/2 explained_variance", f"At a glance/3 {headline}"]
    assert tags == [*first, *sorted(names)]


def read_hparams(folder, settings):
    """Read the HParams plugin's records of a run folder, by tag."""
    swept = ["model.name", "loss.l1"]
    folder.mkdir(exist_ok=True)
    HeadLog(folder, HParams(settings, RELU | DENSE, swept), resumed_at=None).close()
    events = EventAccumulator(str(folder)).Reload()
    return events.PluginTagToContent(metadata.PLUGIN_NAME)


def test_every_run_names_the_columns_of_all_and_those_that_differ(tmp_path):
    """TensorBoard takes the columns from any one run, and shows those that differ first."""
    for name, settings in (("relu", RELU), ("dense", DENSE)):
        content = read_hparams(tmp_path / name, settings)[metadata.EXPERIMENT_TAG]
        experiment = metadata.parse_experiment_plugin_data(content)
        infos = {info.name: info.differs for info in experiment.hparam_infos}
        assert infos == {"model.name": True, "loss.l1": True, "optim.lr": False}
        assert {info.name.tag for info in experiment.metric_infos} == set(HEADLINE)


def test_a_run_has_its_own_settings_only(tmp_path):
    content = read_hparams(tmp_path, DENSE)[metadata.SESSION_START_INFO_TAG]
    start = metadata.parse_session_start_info_plugin_data(content)
    assert set(start.hparams) == set(DENSE)
    assert start.hparams["model.name"].string_value == "dense"

"""What `analyze.py` can be asked; a new task is a row."""

from sae_lightning.analysis.evaluate import EvaluateTask
from sae_lightning.analysis.explain.task import ExplainTask
from sae_lightning.analysis.lens import LensTask
from sae_lightning.analysis.overview import OverviewTask
from sae_lightning.analysis.probing.task import ProbeTask
from sae_lightning.analysis.steer import SteerTask
from sae_lightning.analysis.survey.task import FeaturesTask
from sae_lightning.analysis.sweep import SweepTask
from sae_lightning.analysis.task import Task
from sae_lightning.analysis.text import TextTask
from sae_lightning.analysis.theory.task import TheoryTask

TASKS: dict[str, type[Task]] = {
    "overview": OverviewTask,
    "features": FeaturesTask,
    "evaluate": EvaluateTask,
    "theory": TheoryTask,
    "probe": ProbeTask,
    "lens": LensTask,
    "steer": SteerTask,
    "text": TextTask,
    "explain": ExplainTask,
    "sweep": SweepTask,
}

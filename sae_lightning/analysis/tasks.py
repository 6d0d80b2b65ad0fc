"""The table of tasks that `analyze.py` can run; a new task is an entry."""

from sae_lightning.analysis.annotate import TextTask
from sae_lightning.analysis.benchmarks.benchmark_task import BenchmarkTask
from sae_lightning.analysis.evaluate import EvaluateTask
from sae_lightning.analysis.explain.explain_task import ExplainTask
from sae_lightning.analysis.export_task import ExportTask
from sae_lightning.analysis.lens import LensTask
from sae_lightning.analysis.overview import OverviewTask
from sae_lightning.analysis.probing.probe_task import ProbeTask
from sae_lightning.analysis.publish_task import PublishTask
from sae_lightning.analysis.steer import SteerTask
from sae_lightning.analysis.survey.features_task import FeaturesTask
from sae_lightning.analysis.sweep_task import SweepTask
from sae_lightning.analysis.task import Task
from sae_lightning.analysis.theory.theory_task import TheoryTask

TASKS: dict[str, type[Task]] = {
    "overview": OverviewTask,
    "features": FeaturesTask,
    "evaluate": EvaluateTask,
    "theory": TheoryTask,
    "probe": ProbeTask,
    "benchmark": BenchmarkTask,
    "lens": LensTask,
    "steer": SteerTask,
    "text": TextTask,
    "explain": ExplainTask,
    "export": ExportTask,
    "publish": PublishTask,
    "sweep": SweepTask,
}

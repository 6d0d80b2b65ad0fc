"""`suite=probing`: how well do k features tell classes of texts apart?"""

from sae_lightning.analysis.benchmarks.benchmark import Benchmark
from sae_lightning.analysis.subject import Subject


def run_probing(subject: Subject) -> Benchmark:
    """Fit k-sparse probes on labelled sets of texts."""
    raise NotImplementedError

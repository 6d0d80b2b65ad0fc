"""`task=probe`: do features match abstract ideas better than neurons do?"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sae_lightning.analysis.probing.labelled_text import read_labelled_text
from sae_lightning.analysis.probing.probe_sections import make_probe_sections
from sae_lightning.analysis.probing.probes import Probes, probe
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.task import Task, check_at_least
from sae_lightning.errors import UserError
from sae_lightning.sae import SAE


@dataclass(slots=True, kw_only=True)
class ProbeTask(Task):
    """Do features match abstract ideas better than neurons do?"""

    label: str = "genre"
    """What to predict: genre, play or speaker of the packaged plays, or the name of the column of
    `data` that holds the classes."""
    tokens: int = 131_072
    """Tokens of labelled text to read."""

    def __post_init__(self):
        check_at_least("tokens", self.tokens, 1024)
        if not self.label:
            raise UserError("label is empty: give genre, play, speaker or the name of a column")

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        result = run_probes(subject, self.label, self.tokens)
        self.print_and_write(subject, result.to_dict(), make_probe_sections(result))


def run_probes(
    subject: Subject, label: str, tokens: int, controls: Mapping[str, SAE] = {}
) -> Probes:
    """Fit probes that predict `label`, on `tokens` tokens of the subject's text, from the features
    of the SAE and of `controls`, from neurons and from random directions."""
    config = subject.config
    text = read_labelled_text(
        config.data, label, subject.tokenizer, tokens=tokens, seed=config.seed
    )
    return probe(subject, text, batch=config.llm.batch, controls=controls)

"""What `analyze.py` does: each task opens what it needs, and leaves its numbers as JSON, a page to
open and a short account at the terminal."""

import math
import os
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from sae_lightning.analysis import evaluate, lens, steering
from sae_lightning.analysis.explain import explained
from sae_lightning.analysis.explain.answers import Answers
from sae_lightning.analysis.explain.evidence import choose, gather
from sae_lightning.analysis.explain.explainer import Explainer
from sae_lightning.analysis.probing import probes
from sae_lightning.analysis.probing import sections as probe_sections
from sae_lightning.analysis.probing.labelled import labelled
from sae_lightning.analysis.settings import (
    AnalyzeConfig,
    EvaluateConfig,
    ExplainConfig,
    FeaturesConfig,
    LensConfig,
    OverviewConfig,
    ProbeConfig,
    SteerConfig,
    SweepReportConfig,
    TheoryConfig,
)
from sae_lightning.analysis.subject import Subject, known
from sae_lightning.analysis.survey import survey
from sae_lightning.analysis.survey.collect import Reducer, collect, excerpt
from sae_lightning.analysis.survey.survey import Survey
from sae_lightning.analysis.theory import claims
from sae_lightning.analysis.theory import sections as theory_sections
from sae_lightning.analysis.trained import Trained, open_reader, open_subject, open_trained
from sae_lightning.errors import UserError
from sae_lightning.files import atomically, write_json
from sae_lightning.llm.generate import Sampling
from sae_lightning.llm.load import LLM
from sae_lightning.llm.sites import distinct
from sae_lightning.llm.vocabulary import special_ids, vocabulary
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.page import page
from sae_lightning.report.parquet import write_table
from sae_lightning.report.printer import say, say_lead, say_units
from sae_lightning.report.section import Section
from sae_lightning.report.sweep_report import write_report
from sae_lightning.runs.folders import sweep_runs
from sae_lightning.runs.inputs import is_text, open_held_out
from sae_lightning.runs.jobs import CONFIG_FILE
from sae_lightning.stream.text import PlaysConfig
from sae_lightning.stream.tokens import Tokens
from sae_lightning.terminal import command, console, shown

SHOWN = 5  # features at the terminal
NEXT = ("lens", "steer", "explain")  # tasks for a feature that looks interesting
PROBED = 65_536  # tokens of labelled text in the overview


def _overview(asked: OverviewConfig, given: Collection[str]) -> None:
    """Everything that is cheap, on one page."""
    trained = _opened(asked, given)
    if not is_text(trained.config):  # of concepts there is only a scorecard
        card = _scored(trained, None)
        return _finish(trained, asked, {"evaluate": card.scalars()}, [evaluate.section(card)])
    subject, text = open_reader(trained)
    reducers = claims.TheoryReducers(subject)
    found = _surveyed(asked, trained, subject, text, reducers)
    card = _scored(trained, None, (subject.llm, text))
    tested = claims.theory(subject, reducers)
    summary, scored = survey.section(found), evaluate.section(card)
    say(summary)
    say_units(found.features, survey.best_read(found.features, SHOWN))
    probed = None
    if isinstance(trained.config.data, PlaysConfig):  # whose labels are known
        probed = _probed(trained, subject, "speaker", PROBED)
    parts = {
        "Scorecard": [summary, scored],
        "Theory": theory_sections.sections(tested),
        "Probes": probe_sections.sections(probed) if probed else [],
    }
    for section in [scored, *parts["Theory"], *parts["Probes"]]:
        say_lead(section)
    scalars = {
        "features": found.scalars(),
        "evaluate": card.scalars(),
        "theory": tested.numbers,
        "probe": probed and probed.scalars(),
    }
    sections = [section._replace(part=part) for part, mine in parts.items() for section in mine]
    _publish(trained, asked, scalars, sections, [found.features, found.neurons])
    return None


def _features(asked: FeaturesConfig, given: Collection[str]) -> None:
    """What each feature fires on."""
    trained = _opened(asked, given)
    found = _surveyed(asked, trained, *open_reader(trained))
    section = survey.section(found)
    say(section)
    say_units(found.features, survey.best_read(found.features, SHOWN))
    _publish(trained, asked, found.scalars(), [section], [found.features, found.neurons])


def _surveyed(
    asked: FeaturesConfig, trained: Trained, subject: Subject, text: Tokens, *reducers: Reducer
) -> Survey:
    """The survey with the features' effects, written as parquet files too."""
    config = trained.config
    found = survey.survey(
        subject,
        text.train,
        tokens=asked.tokens,
        examples=asked.examples,
        neurons=asked.neurons,
        batch=config.llm.batch,
        seed=config.seed,
        reducers=reducers,
    )
    found = found._replace(
        features=found.features._replace(effect=lens.lens(subject, text=text.train).effect)
    )
    for name, catalogue in (("features", found.features), ("neurons", found.neurons)):
        write_table(_folder(trained) / f"{name}.parquet", catalogue)
    return found


def _evaluate(asked: EvaluateConfig, given: Collection[str]) -> None:
    """The held-out scorecard."""
    trained = _opened(asked, given)
    result = _scored(trained, asked.tokens)
    _finish(trained, asked, result.scalars(), [evaluate.section(result)])


def _scored(
    trained: Trained, tokens: int | None, opened: tuple[LLM, Tokens] | None = None
) -> evaluate.Evaluation:
    held_out = open_held_out(trained.config, distinct([trained.sites]), tokens, opened)
    return evaluate.evaluate(trained.sae, held_out, trained.sites)


def _theory(asked: TheoryConfig, given: Collection[str]) -> None:
    """The claims of superposition theory."""
    trained = _opened(asked, given)
    subject, text = open_reader(trained)
    reducers = claims.TheoryReducers(subject)
    parts, total = excerpt(text.train, asked.tokens, trained.config.llm.batch)
    collect(subject, parts, [reducers], total=total)
    result = claims.theory(subject, reducers)
    _finish(trained, asked, result.numbers, theory_sections.sections(result))


def _probe(asked: ProbeConfig, given: Collection[str]) -> None:
    """Do features match abstract ideas better than neurons do?"""
    trained = _opened(asked, given)
    result = _probed(trained, open_subject(trained), asked.label, asked.tokens)
    _finish(trained, asked, result.scalars(), probe_sections.sections(result))


def _probed(trained: Trained, subject: Subject, label: str, tokens: int) -> probes.Probes:
    config = trained.config
    text = labelled(config.data, label, subject.llm.tokenizer, tokens=tokens, seed=config.seed)
    return probes.probe(subject, text, batch=config.llm.batch)


def _lens(asked: LensConfig, given: Collection[str]) -> None:
    """What features say to the output and read at the input."""
    trained = _opened(asked, given)
    chosen = asked.feature and known(trained.sae, asked.feature)
    if asked.direct:
        subject = open_subject(trained)
        result = lens.lens(subject, asked.top)
    else:
        subject, text = open_reader(trained)
        result = lens.lens(subject, asked.top, text.train, chosen or (), asked.contexts)
    section = lens.section(result, vocabulary(subject.llm), chosen)
    _finish(trained, asked, section.table._asdict() if section.table else {}, [section])


def _steer(asked: SteerConfig, given: Collection[str]) -> None:
    """Text with a feature turned up."""
    trained = _opened(asked, given)
    known(trained.sae, [asked.feature])
    result = steering.steer(
        open_subject(trained),
        asked.feature,
        asked.strength,
        asked.prompt,
        tokens=asked.tokens,
        mode=asked.mode,
        sampling=Sampling(asked.temperature, asked.top_p, asked.seed),
    )
    _finish(trained, asked, result._asdict(), [steering.section(result)])


def _explain(asked: ExplainConfig, given: Collection[str]) -> None:
    """Features in words."""
    trained = _opened(asked, given)
    chosen = asked.feature and known(trained.sae, asked.feature)
    model = explained.open_model(asked.endpoint, asked.explainer, asked.key_env, asked.concurrency)
    answers = model and Answers(model)
    if answers:
        answers.check()  # before any text is read
    subject, text = open_reader(trained)
    seed = trained.config.seed
    found = survey.survey(
        subject,
        text.train,
        tokens=asked.tokens,
        examples=asked.examples,
        batch=trained.config.llm.batch,
        seed=seed,
    )
    features = chosen or choose(found.features, asked.count, seed)
    if answers is None:
        section = explained.without_model(found.features, features)
        return _finish(trained, asked, section.table._asdict() if section.table else {}, [section])
    special = special_ids(subject.llm.tokenizer)
    evidence = gather(
        found.features, found.sample, features, scored=asked.scored, special=special, seed=seed
    )
    explainer = Explainer(answers, together=asked.together, thinking=asked.thinking, seed=seed)
    plan = explainer.estimate(evidence, asked.price_in, asked.price_out)
    console.print(str(plan))
    plan.within(asked.budget)
    result = explained.Explained(explainer.explain(evidence), answers.spent, asked.explainer)
    return _finish(trained, asked, result.scalars(), [explained.section(result)])


def _sweep(asked: SweepReportConfig, given: Collection[str]) -> None:
    """The report of a multirun again."""
    folder = Path(asked.run)
    if others := sorted({*given} - {"run", "task"}):
        raise UserError(
            f"{others[0]} has no meaning for task=sweep, which reads what each run has measured: "
            "leave it out"
        )
    if (folder / CONFIG_FILE).is_file():
        above = shown(folder.absolute().parent)
        raise UserError(
            f"{asked.run} holds one run, no sweep: leave out task=sweep to look at it, or give "
            f"the folder above it for the report of all runs there (run={above})"
        )
    write_report(folder, sweep_runs(folder))


TASKS: dict[str, Callable[[Any, Collection[str]], None]] = {
    "overview": _overview,
    "features": _features,
    "evaluate": _evaluate,
    "theory": _theory,
    "probe": _probe,
    "lens": _lens,
    "steer": _steer,
    "explain": _explain,
    "sweep": _sweep,
}


def _opened(asked: AnalyzeConfig, given: Collection[str]) -> Trained:
    """The SAE, once it is known that what is found can be written beside it."""
    trained = open_trained(asked, given)
    place = _folder(trained) if _folder(trained).exists() else trained.folder
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(
            f"{place} cannot be written to: copy {trained.folder} (its config.yaml and sae/ will "
            "do) to where you can write, and give that folder as run=..."
        )
    return trained


def _folder(trained: Trained) -> Path:
    return trained.folder / "analysis"


def _finish(
    trained: Trained, asked: AnalyzeConfig, scalars: dict[str, Any], sections: Sequence[Section]
) -> None:
    """Print and publish a task's sections."""
    for section in sections:
        say(section)
    _publish(trained, asked, scalars, sections)


def _publish(
    trained: Trained,
    asked: AnalyzeConfig,
    scalars: dict[str, Any],
    sections: Sequence[Section],
    catalogues: Sequence[Catalogue] = (),
) -> None:
    """Write a task's numbers and its page, and say where they are."""
    name = f"{asked.task}.html" if asked.task != "overview" else "index.html"
    target = _folder(trained) / name
    numbers = target.with_name(f"{asked.task}.json")
    write_json(numbers, jsonable(scalars))
    text = page(
        trained.name, trained.facts(), sections, catalogues, following(trained, asked, catalogues)
    )
    with atomically(target) as temporary:
        temporary.write_text(text, encoding="utf8")
    console.print(f"\n  open in a browser: {shown(target)}\n  the same numbers: {shown(numbers)}\n")


def following(trained: Trained, asked: AnalyzeConfig, catalogues: Sequence[Catalogue]) -> list[str]:
    """What to ask next: of the feature that was asked for, or one with a clear pattern."""
    run = shown(trained.folder)
    feature = getattr(asked, "feature", None)
    if catalogues:
        feature = survey.best_read(catalogues[0], 1)
    if isinstance(feature, list):
        feature = feature[0] if feature else None
    if feature is None:
        return [command("analyze.py", run=run)]
    return [command("analyze.py", run=run, task=task, feature=feature) for task in NEXT]


def jsonable(value: Any) -> Any:
    """`value` with tuples as lists, named ones as objects, and nan as null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    if isinstance(value, Enum):
        return value.name
    return None if isinstance(value, float) and not math.isfinite(value) else value

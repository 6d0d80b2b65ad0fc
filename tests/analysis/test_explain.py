"""A right explanation of a planted feature scores 1, one that says nothing scores chance."""

import re

import pytest
import torch
from batches import pick_active
from chat_server import ChatServer, oracle

from sae_lightning.analysis.collect import EncodedBatch
from sae_lightning.analysis.explain import prompts
from sae_lightning.analysis.explain.answers import Answers
from sae_lightning.analysis.explain.evidence import (
    DOCUMENT_MARK,
    Evidence,
    Window,
    gather,
    pick_features,
)
from sae_lightning.analysis.explain.explainer import (
    Explainer,
    VerdictScore,
    make_detection_trials,
    make_fuzzing_trials,
    score_verdicts,
)
from sae_lightning.analysis.explain.explanation_sections import (
    Explanations,
    make_explanation_section,
    make_token_set_section,
)
from sae_lightning.analysis.explain.models import Endpoint, LocalModel, Question
from sae_lightning.analysis.explain.prompts import DETECT, FUZZ
from sae_lightning.analysis.survey import strengths
from sae_lightning.analysis.survey.examples import FiringStatistics, StrongestExamples
from sae_lightning.analysis.survey.intervals import draw_examples
from sae_lightning.analysis.survey.sample import Sample, SequenceSampler
from sae_lightning.analysis.survey.token_sets import score_token_sets
from sae_lightning.errors import UserError
from sae_lightning.llm.generate import Reply
from sae_lightning.llm.load import Dtype, LLMConfig, load_llm
from sae_lightning.report.catalogue import Catalogue

WORDS = ["<bos>", "fox", "sea"] + [a + b for a in "bcdfgklmnprst" for b in ("ab", "eg", "ot")]
BOS, FOX, SEA = 0, 1, 2
SILENT, EVERYWHERE = 2, 3  # features; feature 0 is of the fox, feature 1 of the sea
SEQUENCES, CONTEXT = 240, 64


def world(tokens: torch.Tensor, vocabulary: list[str]) -> tuple[Catalogue, Sample]:
    """What a pass over `tokens` [sequences, context] would find, the ids modulo len(WORDS)."""
    random = torch.Generator().manual_seed(0)
    word, keep = tokens % len(WORDS), tokens != BOS
    features = torch.zeros(*tokens.shape, 4)
    features[..., 0], features[..., 1] = (word == FOX), (word == SEA)
    features[..., EVERYWHERE] = 1
    features *= keep[..., None] * (1 + 4 * torch.rand(features.shape, generator=random))
    x = torch.zeros(*tokens.shape, 1)
    batch = EncodedBatch(tokens, keep, x, x, pick_active(features), torch.arange(len(tokens)))
    reducers = (
        FiringStatistics(4, strengths.read_feature_strengths),
        StrongestExamples(4, 24, strengths.read_feature_strengths),
    )
    sampling = SequenceSampler(4, seed=0)
    for reducer in [*reducers, sampling]:
        reducer.add(batch)
    (statistics, top), sample = (reducer.result() for reducer in reducers), sampling.result()
    spread = draw_examples(sample, statistics.maximum, top, per_interval=4, seed=0)
    return Catalogue("feature", vocabulary, tokens.numpy(), statistics, top, spread), sample


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, len(WORDS), (SEQUENCES, CONTEXT), generator=random)
    tokens[:, 0] = BOS
    return tokens


@pytest.fixture(scope="module")
def planted(text) -> tuple[Catalogue, Sample]:
    return world(text, [WORDS[0], *(f" {word}" for word in WORDS[1:])])


@pytest.fixture
def evidence(planted) -> list[Evidence]:
    return gather(*planted, [0, 1], special=[BOS])


class Scripted:
    """A model in this process that says what a function says."""

    name, concurrency, key = "scripted", 2, ""

    def __init__(self, say):
        self.say, self.asked = say, []

    def complete(self, question: Question, patient: bool = True) -> Reply:
        self.asked.append(question)
        return Reply(self.say(question.text), len(question.text) // 4, question.tokens // 2)


def make_explainer(folder, say=oracle, **options) -> Explainer:
    return Explainer(Answers(Scripted(say), folder), **options)


def judging(verdict):
    """An oracle that explains, but judges by verdict(number of the text)."""

    def say(question: str) -> str:
        if "the word " not in question:
            return oracle(question)
        numbers = re.findall(r"^(\d+)\. ", question, re.MULTILINE)
        return "\n".join(f"{n}: {verdict(int(n))}" for n in numbers)

    return say


def test_who_reads_the_texts_explains_planted_features_and_scores_1(evidence, tmp_path):
    with ChatServer(oracle) as server:
        answers = Answers(Endpoint(server.url, "small"), tmp_path)
        found = Explainer(answers).explain_features(evidence)
        assert [(each.feature, each.text) for each in found] == [
            (0, "the word fox"),
            (1, "the word sea"),
        ]
        for each in found:
            assert each.detection == (1.0, 20, 20, 0)
            assert each.fuzzing == (1.0, 20, 20, 0)
            assert 17 < each.shown <= 22  # half of 24 + 20, but for those of one sequence
        # an explanation, 40 texts to detect and 40 to see through, 5 at a time
        assert len(server.requests) == answers.spent.requests == 2 * (1 + 8 + 8)


@pytest.mark.parametrize("verdict", ["yes", "no"])
def test_who_always_says_the_same_scores_a_half(evidence, tmp_path, verdict):
    for each in make_explainer(tmp_path, judging(lambda n: verdict)).explain_features(evidence):
        assert (each.detection.accuracy, each.fuzzing.accuracy) == (0.5, 0.5)


def test_who_guesses_scores_about_a_half(planted, tmp_path):
    (evidence,) = gather(*planted, [0], scored=60, special=[BOS])
    random = torch.Generator().manual_seed(0)

    def guess(n: int) -> str:
        return "yes" if torch.rand((), generator=random) < 0.5 else "no"

    (each,) = make_explainer(tmp_path, judging(guess)).explain_features([evidence])
    for found in (each.detection, each.fuzzing):
        assert found.yes == found.no == 60
        # balanced accuracy of 60 + 60 guesses has a deviation of sqrt(2 / 4 / 60) / 2 = 0.046
        assert 0.36 < found.accuracy < 0.64


def test_a_wrong_explanation_detects_nothing(evidence, tmp_path):
    fox, sea = evidence
    swapped = fox._replace(firing=sea.firing, silent=sea.silent)
    (each,) = make_explainer(tmp_path).explain_features([swapped])
    assert each.text == "the word fox"
    assert each.detection.accuracy < 0.75, "foxes turn up beside the sea by chance only"
    assert each.fuzzing.accuracy < 0.6


def test_no_text_that_the_explainer_saw_is_scored(text):
    """Each word says which sequence it is of, so that a text shows where it is from."""
    number = torch.arange(SEQUENCES)[:, None] * len(WORDS)
    vocabulary = [f" {word}.{i}" for i in range(SEQUENCES) for word in WORDS]
    catalogue, sample = world(torch.where(text == BOS, BOS, text + number), vocabulary)
    for each in gather(catalogue, sample, [0, 1, EVERYWHERE], scored=40, special=[BOS]):
        groups = [
            [
                {token.split(".")[1] for token in window.tokens if token != DOCUMENT_MARK}
                for window in group
            ]
            for group in (each.shown, each.firing, each.silent)
        ]
        assert all(len(sequences) == 1 for group in groups for sequences in group)
        sequences = [next(iter(one)) for group in groups for one in group]
        assert len(sequences) == len(set(sequences)) >= 18 + 40


def test_texts_that_read_the_same_are_one(text):
    """Four sequences over and over: everything there is to see is shown."""
    catalogue, sample = world(text[:4].repeat(60, 1), WORDS)
    (evidence,) = gather(catalogue, sample, [0], special=[BOS])
    windows = [*evidence.shown, *evidence.firing, *evidence.silent]
    assert len({window.tokens for window in windows}) == len(windows)


def test_a_feature_is_silent_in_silent_texts_and_fires_in_the_others(planted):
    (fox,) = gather(*planted, [0], scored=60, special=[BOS])
    assert (len(fox.firing), len(fox.silent)) == (60, 60)
    for window in fox.silent:
        assert " fox" not in window.tokens
        assert set(window.strengths) == {0}
    for window in fox.shown + fox.firing:
        pairs = zip(window.tokens, window.strengths, strict=True)
        assert all((token == " fox") == (strength > 0) for token, strength in pairs)
        assert " fox" in window.tokens
    lengths = [{len(window.tokens) for window in group} for group in (fox.firing, fox.silent)]
    assert all(min(each) < 32 and max(each) == 32 for each in lengths), "both at the edges too"


def test_evidence_does_not_depend_on_what_else_is_asked(planted):
    assert gather(*planted, [1, 0])[1] == gather(*planted, [0])[0]
    assert gather(*planted, [0], seed=1) != gather(*planted, [0])


def test_features_are_chosen_among_those_that_fire(planted):
    catalogue, _ = planted
    assert pick_features(catalogue, 10) == [0, 1, EVERYWHERE]
    assert len(pick_features(catalogue, 2)) == 2


def test_a_feature_that_never_fires_costs_nothing(planted, tmp_path):
    explainer = make_explainer(tmp_path)
    (each,) = explainer.explain_features(gather(*planted, [SILENT]))
    assert (each.text, each.detection, each.fuzzing) == (None, None, None)
    assert explainer.answers.spent.requests == 0
    assert explainer.estimate_cost(gather(*planted, [SILENT])).requests == 0


def test_a_feature_that_fires_everywhere_cannot_be_tested(planted, tmp_path):
    (each,) = make_explainer(tmp_path).explain_features(
        gather(*planted, [EVERYWHERE], special=[BOS])
    )
    assert each.text is not None
    assert each.detection is None
    # where it is strong the tokens are marked; next to none is silent
    assert each.fuzzing is None


def test_malformed_verdicts_are_counted_and_not_guessed(evidence, tmp_path):
    (each, _) = make_explainer(tmp_path / "1", judging(lambda n: "perhaps")).explain_features(
        evidence
    )
    assert each.detection == each.fuzzing == (None, 0, 0, 40)

    def short(question: str) -> str:
        return oracle(question).rpartition("\n")[0] or oracle(question)  # leaves out the last text

    (each, _) = make_explainer(tmp_path / "2", short).explain_features(evidence)
    for found in (each.detection, each.fuzzing):
        assert (found.accuracy, found.malformed, found.yes + found.no) == (1.0, 8, 32)


def test_an_explainer_that_says_nothing_is_not_scored(evidence, tmp_path):
    explainer = make_explainer(tmp_path, lambda question: " ")
    (each, _) = explainer.explain_features(evidence)
    assert (each.text, each.detection) == (None, None)
    assert explainer.answers.spent.requests == 2


def test_the_estimate_is_what_is_asked_and_an_upper_bound_of_the_cost(evidence, tmp_path):
    explainer = make_explainer(tmp_path, thinking=10)
    before = explainer.estimate_cost(evidence)
    explainer.explain_features(evidence)
    spent = explainer.answers.spent
    assert before.requests == spent.requests == 34
    assert before.tokens_in >= spent.tokens_in
    assert before.tokens_out >= spent.tokens_out
    assert explainer.estimate_cost(evidence) == (0, 0, 0)


def test_a_budget_is_of_tokens_in_and_out_together(evidence, tmp_path):
    cost = make_explainer(tmp_path).estimate_cost(evidence)
    most = cost.tokens_in + cost.tokens_out
    cost.check_budget(None)
    cost.check_budget(most)
    message = f"budget={most - 1}: this may take {most:,} tokens .*34 requests"
    with pytest.raises(UserError, match=message) as caught:
        cost.check_budget(most - 1)
    assert "\n" not in str(caught.value)


def test_after_a_crash_only_what_is_missing_is_asked(evidence, tmp_path):
    class Crashing(Scripted):
        def complete(self, question: Question, patient: bool = True) -> Reply:
            if len(self.asked) == 10:
                raise KeyboardInterrupt
            return super().complete(question)

    first = Crashing(oracle)
    first.concurrency = 1
    with pytest.raises(KeyboardInterrupt):
        Explainer(Answers(first, tmp_path)).explain_features(evidence)
    again = make_explainer(tmp_path)
    assert again.estimate_cost(evidence).requests == 24
    assert again.explain_features(evidence)[1].fuzzing.accuracy == 1
    assert again.answers.spent.requests == 24


@pytest.mark.slow
def test_a_local_model_explains_and_is_scored(evidence, tiny_folder, tmp_path):
    llm = load_llm(LLMConfig(name=tiny_folder("llama"), dtype=Dtype.float32, device="cpu"))
    llm.model.config.max_position_embeddings = 10_000
    few = Evidence(0, *(group[:4] for group in evidence[0][1:]))
    (each,) = Explainer(Answers(LocalModel(llm), tmp_path), together=8).explain_features([few])
    assert each.text, "gibberish, but some"
    assert each.detection.yes + each.detection.no + each.detection.malformed == 8


def test_no_request_holds_a_text_both_rightly_and_wrongly_marked(evidence):
    for together in (1, 7, 20):
        trials = make_fuzzing_trials(evidence[0], together)
        texts = [re.sub("<<|>>", "", t) for trial in trials for t in trial.texts]
        assert len(texts) == 2 * len(set(texts)) == 40
        for trial in trials:
            bare = {re.sub("<<|>>", "", text) for text in trial.texts}
            assert len(bare) == len(trial.texts) <= together
        for text, truth in [pair for trial in trials for pair in zip(*trial[1:], strict=True)]:
            marked = re.findall("<<(.*?)>>", text)
            assert all(("fox" in mark) == truth for mark in marked)


def test_the_order_of_texts_does_not_tell_the_truth(evidence):
    truths = [truth for trial in make_detection_trials(evidence[0], 5) for truth in trial.truths]
    assert truths != sorted(truths) != sorted(truths, reverse=True)
    assert sum(truths) == 20
    assert all(trial.template == DETECT for trial in make_detection_trials(evidence[0], 5))
    assert all(trial.template == FUZZ for trial in make_fuzzing_trials(evidence[0], 5))


def window(**tokens: float) -> Window:
    return Window(tuple(f" {token}" for token in tokens), tuple(tokens.values()))


def test_tokens_that_fire_at_least_a_third_as_strongly_are_marked():
    strong = window(an=0, old=3, red=10, fox=9, ran=0)
    twice = strong._replace(strengths=(0, 2, 10, 0, 9))
    assert prompts.mark_tokens(strong) == "an <<old red fox>> ran"
    assert prompts.mark_tokens(twice) == "an old <<red>> fox <<ran>>"
    assert prompts.mark_tokens(strong, [0, 4]) == "<<an>> old red fox <<ran>>"
    assert prompts.join_tokens(strong) == "an old red fox ran"
    lines = Window(("ROMEO", ":\n", " <<", "ay"), (0, 1, 0, 0))
    assert prompts.mark_tokens(lines) == "ROMEO<<:↵>> ‹‹ay"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Explanation: names of cities", "names of cities"),
        ("**Explanation:** names of cities**", "names of cities"),
        ('Sure!\nExplanation: the word "in"\nIt is common.', 'the word "in"'),
        ("names of cities", "names of cities"),
        ("<think>Explanation: no\nhm</think>\n\nExplanation: yes", "yes"),
        ("", None),
        ("<think>too long to", None),
    ],
)
def test_an_explanation_is_taken_out_of_what_surrounds_it(answer, text):
    assert prompts.parse_explanation(answer) == text


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("1: yes\n2: no\n3: yes", [True, False, True]),
        ("**1.** Yes\n2) NO.\nText 3: yes, clearly", [True, False, True]),
        ("3: yes\n1: no", [False, None, True]),
        ("1. 1: Yes\n2. 2: No\n3. 4: Yes", [True, False, None]),
        ("1: yes\n1: no\n2: no\n2: no\n4: yes", [None, False, None]),  # contradicts itself
        ("yes, no, yes", [None, None, None]),
        ("1: yesterday\n2: not sure\n3: perhaps", [None, None, None]),
        ("<think>1: yes\n2: yes</think>1: no", [False, None, None]),
        ("", [None, None, None]),
    ],
)
def test_verdicts_are_read_line_by_line(answer, verdicts):
    assert prompts.parse_verdicts(answer, 3) == verdicts


def test_a_single_text_needs_no_number():
    assert prompts.parse_verdicts("Yes.", 1) == [True]
    assert prompts.parse_verdicts("1: no", 1) == [False]
    assert prompts.parse_verdicts("No, as", 1) == [False]
    assert prompts.parse_verdicts("Nothing of", 1) == [None]
    assert (
        "number" not in prompts.write_judge_prompt(DETECT, "cities", ["in Rome"]).splitlines()[-1]
    )


def test_both_kinds_of_texts_count_the_same():
    # 3 of 4 right where the truth is yes, 1 of 1 where it is no: (3/4 + 1) / 2
    truths = [True, True, True, True, False, False]
    assert score_verdicts(truths, [True, True, True, False, False, None]) == (0.875, 4, 1, 1)
    assert score_verdicts([True, True], [True, False]) == (None, 2, 0, 0)


def test_the_section_says_what_was_found_and_on_how_many_texts(planted, tmp_path):
    explainer = make_explainer(tmp_path)
    evidence = gather(*planted, [0, SILENT], special=[BOS])
    result = Explanations(explainer.explain_features(evidence), explainer.answers.spent, "scripted")
    shown = make_explanation_section(result)
    assert shown.table.rows[0] == ["0: the word fox", "1.00", "1.00", "40 + 40"]
    assert shown.table.rows[1][1:] == ["–", "–", "–"]
    assert shown.numbers["detection"] == "1.00 on average over 1 features (0.5 is chance)"
    assert "not understood" not in shown.numbers
    pair = [result[0][0]._replace(detection=VerdictScore(a, 20, 20, 0)) for a in (0.5, 1.0)]
    # their deviation is 0.25 * sqrt(2), that of their mean 0.25
    rows = make_explanation_section(result._replace(explanations=pair)).numbers
    assert rows["detection"] == "0.75 ± 0.25 on average over 2 features (0.5 is chance)"
    assert shown.texts[0].caption == "0: the word fox"
    scalars = result.to_dict()
    assert (scalars["detection"], scalars["requests"]) == (1.0, 17)
    assert scalars["explanations"][1]["text"] is None


def test_without_a_model_features_are_ranked_by_their_tokens(planted):
    catalogue, sample = planted
    catalogue = catalogue._replace(token_sets=score_token_sets(sample, len(WORDS)))
    shown = make_token_set_section(catalogue, [SILENT, EVERYWHERE, 0])
    assert shown.table.rows[0] == ["0: ' fox'", "1.00"]
    assert shown.table.rows[-1] == ["2: fires too rarely for a score", "–"]
    assert "endpoint=" in shown.lead

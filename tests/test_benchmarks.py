"""The arithmetic behind the benchmarks' tables; the benchmarks themselves are run by hand."""

import importlib
import random
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.timing import child
from benchmarks.timing.floor import floor, llm_floor
from benchmarks.timing.names import name_of
from benchmarks.timing.order import order
from benchmarks.timing.ratios import OURS, rows
from benchmarks.timing.shares import PARTS, REST, Kernel, Span, label_of, on_cpu, on_gpu, shares
from sae_lightning.errors import UserError


def test_time_belongs_to_the_innermost_label():
    spans = [Span("pool", 1, 0, 10), Span("llm", 1, 2, 8), Span("encode", 1, 10, 13)]
    found = on_cpu(spans)
    assert (found["pool"], found["llm"], found["encode"]) == (4, 6, 3)


def test_all_that_happens_in_the_backward_pass_is_the_backward_pass():
    inside = [Span("encode", 1, 2, 5), Span("decode", 1, 3, 4), Span("loss", 1, 6, 7)]
    found = on_cpu([*inside, Span("backward", 1, 1, 9), Span("encode", 1, 9, 10)])
    assert (found["backward"], found["encode"]) == (8, 1)
    assert sum(found.values()) == 9


def test_threads_do_not_nest_in_one_another():
    found = on_cpu([Span("backward", 1, 0, 10), Span("llm", 2, 1, 9)])
    assert (found["backward"], found["llm"]) == (10, 8)


def test_seconds_of_nested_labels_add_up_to_those_of_the_outermost():
    rng = random.Random(0)

    def nest(start: float, end: float, depth: int) -> list[Span]:
        cuts = sorted(rng.uniform(start, end) for _ in range(4))
        inner = [nest(*cuts[i : i + 2], depth - 1) for i in (0, 2)] if depth else []
        return [Span(rng.choice(list(PARTS)), 1, start, end), *(s for part in inner for s in part)]

    for _ in range(20):
        spans = nest(0, 100, depth=4)
        rng.shuffle(spans)
        seconds = on_cpu(spans)
        assert sum(seconds.values()) == pytest.approx(100)
        assert min(seconds.values()) >= 0


def test_a_kernel_counts_where_it_was_launched_and_not_where_it_ran():
    spans = [Span("encode", 1, 0, 1), Span("clip", 1, 1.5, 2)]
    found = on_gpu([Kernel(1, 0.5, 7.0), Kernel(1, 1.2, 3.0), Kernel(1, 1.8, 1.0)], spans)
    assert (found["encode"], found["clip"]) == (7, 1)
    assert sum(found.values()) == 8  # the one between the labels is nobody's


def test_kernels_of_autograds_own_thread_are_the_backward_pass():
    spans = [Span("backward", 1, 0, 10), Span("encode", 1, 11, 12), Span("llm", 3, 0, 20)]
    kernels = [Kernel(2, 5, 4.0), Kernel(3, 5, 2.0), Kernel(1, 11.5, 1.0)]
    found = on_gpu(kernels, spans)
    assert (found["backward"], found["llm"], found["encode"]) == (4, 2, 1)


@pytest.mark.parametrize(("wall", "rest"), [(20.0, 0.5), (10.0, 0.0), (8.0, 0.0)])
def test_shares_add_up_to_one_even_when_parts_overlap(wall, rest):
    found = shares({"llm": 6.0, "encode": 4.0}, wall)
    assert found[REST] == pytest.approx(rest)
    assert sum(found.values()) == pytest.approx(1)
    assert found["LLM"] == pytest.approx(1.5 * found["encode"])


def test_torchs_name_of_an_optimisers_step_is_understood_and_operations_are_not_labels():
    assert label_of("Optimizer.step#Adam.step") == "optimiser"
    assert label_of("backward") == "backward"
    assert label_of("aten::mm") is None


def test_the_floor_is_the_time_of_both_one_after_the_other():
    # 1,000 tokens: 0.2 s in the LLM, 0.05 s in the encode of each SAE
    assert floor(5_000, 20_000) == pytest.approx(1_000 / 0.25)
    assert floor(5_000, 20_000, saes=8) == pytest.approx(1_000 / 0.6)
    assert llm_floor(2e12, 100_000_000) == 10_000


def test_rounds_alternate_their_direction_and_compare_like_with_like_side_by_side():
    runs = [("ours", "relu"), ("ours", "topk"), ("peer", "relu"), ("peer", "topk")]
    there = [("ours", "relu"), ("peer", "relu"), ("ours", "topk"), ("peer", "topk")]
    assert order(runs, 3, key=lambda run: run[1]) == [*there, *reversed(there), *there]


def test_runs_that_differ_in_their_setting_alone_have_names_of_their_own():
    assert name_of("sparsify", "", "topk", "model.k=32") == "sparsify-topk-model.k=32"
    assert name_of("ours", "topk", "model.k=32") != name_of("ours", "topk", "model.k=256")
    assert "/" not in name_of("ours", "loss.path=a/b")


def _result(n: int, tool: str, speed: float, setting: str = "model.k=32") -> dict:
    about = {"architecture": "topk", "setting": setting, "tool": tool}
    variant = "" if tool == OURS else "tuned"
    return {**about, "variant": variant, "round": n, "tokens_per_second": speed, "l0": 32}


def test_ratios_compare_runs_of_one_round_and_one_setting():
    found = rows(
        [
            _result(0, OURS, 600),
            _result(0, "peer", 200),
            _result(0, "peer", 100, setting="model.k=256"),
            _result(0, OURS, 700, setting="model.k=256"),
            _result(1, "peer", 100),  # the machine is slower now
            _result(1, OURS, 400),
        ]
    )
    assert [(row.setting, row.tool) for row in found] == [
        ("model.k=256", OURS),
        ("model.k=256", "peer"),
        ("model.k=32", OURS),
        ("model.k=32", "peer"),
    ]
    assert [row.speeds for row in found] == [[700], [100], [600, 400], [200, 100]]
    assert [row.ratios for row in found] == [[], [7], [], [3, 4]]


def test_a_round_in_which_one_of_both_failed_has_no_ratio():
    results = [_result(0, OURS, 600), _result(1, OURS, 500), _result(1, "peer", 250)]
    assert rows([*results, _result(2, "peer", 100)])[1].ratios == [2]
    assert rows([_result(0, "peer", 250)])[0].ratios == []


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    with pytest.raises(child.Failed, match="nowhere/python cannot be started: No such file"):
        child.call("json:loads", {}, tmp_path / "x.log", "/nowhere/python")


def test_a_process_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(child, "LIMIT", 0.05)
    with pytest.raises(child.Failed, match="not done after"):
        child.call("json:loads", {}, tmp_path / "x.log", str(sleeper))


def _script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark as a module; run as a script, its own folder is what it imports from."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module(name)


@pytest.mark.parametrize("given", ["sweep=8", "profile=false", "models=smollm2,gpt2"])
def test_the_comparison_refuses_what_it_would_ignore(given, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=given):
        _script("speed", monkeypatch).main([given, f"out={tmp_path}"])


def test_the_same_run_twice_is_refused(monkeypatch):
    with pytest.raises(UserError, match="twice"):
        _script("throughput", monkeypatch).read(["runs=topk,topk:model.k=64"])


def test_throughput_goes_on_after_a_run_that_failed(tmp_path, monkeypatch, capsys):
    throughput = _script("throughput", monkeypatch)
    roof = {"llm_tokens_per_second": 300.0, "encode_tokens_per_second": 600.0, "number": "float32"}
    roof |= {"flops": 1e9, "llm_floor_tokens_per_second": 600, "floor_tokens_per_second": 200}
    run = {"tokens_per_second": 100.0, "speed": {"tokens_per_second": 120.0}, "l0": 32.0}
    run |= {"explained_variance": 0.5, "peak_memory_gb": 1.0}

    def answer(work: str, settings: dict, log: Path) -> dict:
        if "k=32" in log.name or work.endswith(":look"):
            raise throughput.Failed("RuntimeError: out of memory")
        return dict(roof if "roofline" in work else run)

    monkeypatch.setattr(throughput, "call", answer)
    throughput.main(["runs=topk:model.k=32,topk:model.k=256", f"out={tmp_path}"])
    shown = capsys.readouterr().out
    assert "smollm2-topk-model.k=32 failed: RuntimeError: out of memory" in shown
    assert "topk k=256" in shown and "50%" in shown

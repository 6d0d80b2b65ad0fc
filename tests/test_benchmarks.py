"""The arithmetic behind the benchmarks' tables; the benchmarks themselves are run by hand."""

import importlib
import json
import random
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from forked import Forked
from on_ranks import fork_ranks
from tiny_run import write_text

from benchmarks.timing import child
from benchmarks.timing.profile import (
    PARTS,
    REST,
    Kernel,
    Span,
    compute_shares,
    read_label,
    sum_cpu_time,
    sum_gpu_time,
)
from sae_lightning import load_sae
from sae_lightning.errors import UserError
from sae_lightning.sae import ARCHITECTURES


@pytest.fixture
def speed(monkeypatch) -> ModuleType:
    return _script("speed", monkeypatch)


@pytest.fixture
def throughput(monkeypatch) -> ModuleType:
    return _script("throughput", monkeypatch)


@pytest.fixture
def devices(monkeypatch) -> ModuleType:
    return _script("devices", monkeypatch)


@pytest.fixture
def interop(monkeypatch) -> ModuleType:
    return _script("interop", monkeypatch)


def _script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a benchmark as a module, with its folder on the path as when it runs as a script."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module(name)


def test_time_belongs_to_the_innermost_label():
    spans = [Span("pool", 1, 0, 10), Span("llm", 1, 2, 8), Span("encode", 1, 10, 13)]
    found = sum_cpu_time(spans)
    assert (found["pool"], found["llm"], found["encode"]) == (4, 6, 3)


def test_all_that_happens_in_the_backward_pass_is_the_backward_pass():
    inside = [Span("encode", 1, 2, 5), Span("decode", 1, 3, 4), Span("loss", 1, 6, 7)]
    found = sum_cpu_time([*inside, Span("backward", 1, 1, 9), Span("encode", 1, 9, 10)])
    assert (found["backward"], found["encode"]) == (8, 1)
    assert sum(found.values()) == 9


def test_threads_do_not_nest_in_one_another():
    found = sum_cpu_time([Span("backward", 1, 0, 10), Span("llm", 2, 1, 9)])
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
        seconds = sum_cpu_time(spans)
        assert sum(seconds.values()) == pytest.approx(100)
        assert min(seconds.values()) >= 0


def test_a_kernel_counts_where_it_was_launched_and_not_where_it_ran():
    spans = [Span("encode", 1, 0, 1), Span("clip", 1, 1.5, 2)]
    found = sum_gpu_time([Kernel(1, 0.5, 7.0), Kernel(1, 1.2, 3.0), Kernel(1, 1.8, 1.0)], spans)
    assert (found["encode"], found["clip"]) == (7, 1)
    assert sum(found.values()) == 8  # the one between the labels is nobody's


def test_kernels_of_autograds_own_thread_are_the_backward_pass():
    spans = [Span("backward", 1, 0, 10), Span("encode", 1, 11, 12), Span("llm", 3, 0, 20)]
    kernels = [Kernel(2, 5, 4.0), Kernel(3, 5, 2.0), Kernel(1, 11.5, 1.0)]
    found = sum_gpu_time(kernels, spans)
    assert (found["backward"], found["llm"], found["encode"]) == (4, 2, 1)


@pytest.mark.parametrize(("wall", "rest"), [(20.0, 0.5), (10.0, 0.0), (8.0, 0.0)])
def test_shares_add_up_to_one_even_when_parts_overlap(wall, rest):
    found = compute_shares({"llm": 6.0, "encode": 4.0}, wall)
    assert found[REST] == pytest.approx(rest)
    assert sum(found.values()) == pytest.approx(1)
    assert found["LLM"] == pytest.approx(1.5 * found["encode"])


def test_torchs_name_of_an_optimisers_step_is_understood_and_operations_are_not_labels():
    assert read_label("Optimizer.step#Adam.step") == "optimiser"
    assert read_label("backward") == "backward"
    assert read_label("aten::mm") is None


def test_the_floor_is_the_time_of_both_one_after_the_other(throughput):
    # 1,000 tokens: 0.2 s in the LLM, 0.05 s in the encode of each SAE
    assert throughput.compute_floor(5_000, 20_000) == pytest.approx(1_000 / 0.25)
    assert throughput.compute_floor(5_000, 20_000, saes=8) == pytest.approx(1_000 / 0.6)
    assert throughput.compute_llm_floor(2e12, 100_000_000) == 10_000


def test_rounds_alternate_their_direction_and_compare_like_with_like_side_by_side(speed):
    runs = [
        speed.Contestant(tool, "", architecture, "k=4")
        for tool in ("ours", "peer")
        for architecture in ("relu", "topk")
    ]
    there = [runs[0], runs[2], runs[1], runs[3]]
    assert speed.order_runs(runs, 3) == [*there, *reversed(there), *there]


def test_runs_that_differ_in_their_setting_alone_have_names_of_their_own():
    assert child.make_name("sparsify", "", "topk", "model.k=32") == "sparsify-topk-model.k=32"
    names = {child.make_name("ours", "topk", f"model.k={k}") for k in (32, 256)}
    assert len(names) == 2
    assert "/" not in child.make_name("ours", "loss.path=a/b")


def _result(n: int, tool: str, rate: float, setting: str = "model.k=32") -> dict:
    about = {"architecture": "topk", "setting": setting, "tool": tool}
    variant = "" if tool == "sae_lightning" else "tuned"
    return {**about, "variant": variant, "round": n, "tokens_per_second": rate, "l0": 32}


def test_ratios_compare_runs_of_one_round_and_one_setting(speed):
    found = speed.make_rows(
        [
            _result(0, speed.OURS, 600),
            _result(0, "peer", 200),
            _result(0, "peer", 100, setting="model.k=256"),
            _result(0, speed.OURS, 700, setting="model.k=256"),
            _result(1, "peer", 100),  # the machine is slower now
            _result(1, speed.OURS, 400),
        ]
    )
    assert [(row.setting, row.tool) for row in found] == [
        ("model.k=256", speed.OURS),
        ("model.k=256", "peer"),
        ("model.k=32", speed.OURS),
        ("model.k=32", "peer"),
    ]
    assert [row.speeds for row in found] == [[700], [100], [600, 400], [200, 100]]
    assert [row.ratios for row in found] == [[], [7], [], [3, 4]]


def test_a_round_in_which_one_of_both_failed_has_no_ratio(speed):
    results = [_result(0, speed.OURS, 600), _result(1, speed.OURS, 500), _result(1, "peer", 250)]
    assert speed.make_rows([*results, _result(2, "peer", 100)])[1].ratios == [2]
    assert speed.make_rows([_result(0, "peer", 250)])[0].ratios == []


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


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [([1.0, -3.0], [1.0, -4.0], 0.25), ([2.0], [2.0], 0.0), ([1.0, 2.0], [1.0], float("inf"))],
)
def test_a_difference_is_a_share_of_the_largest_number(interop, ours, theirs, difference):
    assert interop.measure_difference(torch.tensor(ours), torch.tensor(theirs)) == difference


class _Tool:
    """Opens with our own loader: TopK wrongly, gated SAEs not at all. Writes two SAEs, of which one
    loses its settings."""

    PACKAGE = "torch"

    @staticmethod
    def load(folder: Path):
        if folder.name.startswith("gated"):
            raise ValueError("no gated SAEs\n(more about it)")
        sae = load_sae(folder)
        return lambda x: (sae(x)[0] * (2 if folder.name == "topk" else 1), sae(x)[1])

    @staticmethod
    def make(root: Path):
        for name in ("whole", "lost"):
            shutil.copytree(root.parent / "ours" / "relu", root / name)
            yield name, _Tool.load(root / name)
        (root / "lost" / "cfg.json").unlink()


def test_what_a_tool_opens_and_refuses_is_told_with_the_reason(
    interop, monkeypatch, tmp_path, capsys
):
    def answer(work: str, settings: dict, log: Path, python: str) -> dict:
        if settings["tool"] == "sparsify":
            raise interop.Failed("ImportError: no such package")
        return importlib.import_module("peers.exchange").exchange(**settings)

    monkeypatch.setitem(sys.modules, "peers.interop_saelens", _Tool)
    monkeypatch.setattr(interop, "make_environment", lambda *_: "python")
    monkeypatch.setattr(interop, "call", answer)
    interop.main(["tools=sparsify,saelens", f"out={tmp_path / 'out'}"])
    assert "sparsify: ImportError: no such package" in capsys.readouterr().out
    lines = (tmp_path / "out" / "interop.md").read_text("utf8").splitlines()
    assert len(lines) == 4  # two of them are the head
    ours, theirs = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    opened = ", ".join(name for name in ARCHITECTURES if name != "gated")
    assert ours[1:] == [
        "opens ours",
        f"{opened}; transcoders {opened}; skip transcoders {opened}",
        "5e-01",
        "gated; transcoders gated; skip transcoders gated: SAELens: ValueError: no such SAEs",
    ]
    assert theirs[1:] == [
        "opened by us",
        "whole",
        "0",
        "lost: holds no saved SAE: cfg.json is missing",
    ]


def test_a_tool_that_is_unknown_is_refused_before_anything_is_installed(interop, tmp_path):
    with pytest.raises(UserError, match="tools=pickles: no such tool; choose from saelens, suites"):
        interop.main(["tools=pickles", f"folder={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SAELens' own
@pytest.mark.parametrize("variant", ["documented", "tuned"])
def test_saelens_knows_the_settings_of_its_speed_run(variant, monkeypatch):
    work = dict.fromkeys(("steps", "batch", "context", "llm_batch", "d", "features", "seed"), 8)
    work |= {"bf16": False, "device": "cpu", "llm": "llm", "truncated": "llm", "options": {}}
    peer = _script("peers.speed_saelens", monkeypatch)
    made = peer._make_config("relu", variant, 8, work | {"module": "model.layers.0"})
    assert (made.train_batch_size_tokens, made.checkpoint_path) == (8, None)


@pytest.mark.parametrize("given", ["sweep=8", "profile=false", "models=smollm2,gpt2"])
def test_the_comparison_refuses_what_it_would_ignore(given, tmp_path, speed):
    with pytest.raises(UserError, match=given):
        speed.main([given, f"out={tmp_path}"])


def test_the_same_run_twice_is_refused(throughput):
    with pytest.raises(UserError, match="twice"):
        throughput.read_arguments(["runs=topk,topk:model.k=64"])


def test_throughput_goes_on_after_a_run_that_failed(throughput, tmp_path, monkeypatch, capsys):
    roof = {"llm_tokens_per_second": 300.0, "encode_tokens_per_second": 600.0, "number": "float32"}
    roof |= {"flops": 1e9, "llm_block_parameters": 1_000_000}
    run = {"tokens_per_second": 100.0, "speed": {"tokens_per_second": 120.0}, "l0": 32.0}
    run |= {"explained_variance": 0.5, "peak_memory_gb": 1.0}

    def answer(work: str, settings: dict, log: Path) -> dict:
        if "k=32" in log.name or work.endswith(":profile_run"):
            raise throughput.Failed("RuntimeError: out of memory")
        return dict(roof if work.endswith(":measure_roofline") else run)

    monkeypatch.setattr(throughput, "call", answer)
    throughput.main(["runs=topk:model.k=32,topk:model.k=256", f"out={tmp_path}"])
    shown = capsys.readouterr().out
    assert "smollm2-topk-model.k=32 failed: RuntimeError: out of memory" in shown
    assert "topk k=256" in shown and "50%" in shown


def test_the_least_is_what_the_other_devices_do_not_have(devices):
    rank = {"rows": 1000, "reconstruction": 4000}
    assert [devices.compute_least_bytes("sweep", n, rank) for n in (1, 2, 4)] == [0, 500, 750]
    # a sum goes half way round the ring, and its result as far again
    assert [devices.compute_least_bytes("wide topk", n, rank) for n in (1, 2, 4)] == [0, 4000, 6000]


def test_cases_are_named_after_their_saes(devices):
    assert [*devices.read_arguments([]).cases] == ["sweep", "wide topk", "wide relu"]
    assert devices.read_arguments(["full", "devices=4"]).cases == {"wide topk": ["topk"]}
    assert devices.read_arguments(["sweep=relu,topk", "wide="]).cases == {"sweep": ["relu", "topk"]}


@pytest.fixture
def forked_devices(devices, monkeypatch):
    """The benchmark, with forks in place of new processes: they need not import anything."""

    def call(work: str, settings: dict, log: Path) -> list:
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = [str(child.HERE), work, json.dumps(settings), str(log)]
        done = Forked(_run_child, arguments).wait()
        assert done.returncode == 0, done.stderr
        return json.loads(log.read_text("utf8"))

    monkeypatch.setattr(devices, "call", call)
    return devices


def _run_child(arguments: list[str]) -> None:
    fork_ranks()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _measure_two_devices(devices: ModuleType, out: Path, *arguments: str) -> tuple[dict, dict]:
    small = ["trainer.tokens=4096", "trainer.batch=256", "data.pool=1024", "model.features=512"]
    devices.main([f"out={out}", "eval.tokens=120", *small, *arguments])
    one, two = json.loads((out / "devices.json").read_text("utf8"))
    return one, two


@pytest.mark.slow
def test_a_sweep_on_two_devices_sends_its_rows_once_and_saves_the_same_bytes(
    forked_devices, tmp_path, tiny_folder
):
    llm = [f"llm.name={tiny_folder('llama')}", "llm.device=cpu", "llm.dtype=float32"]
    (tmp_path / "text").mkdir()
    text = ["data=text", f"data.path={write_text(tmp_path / 'text')}", "data.held_out=0.34"]
    text += ["layer.index=1", "llm.batch=4", "data.context=16"]
    _, two = _measure_two_devices(forked_devices, tmp_path, "sweep=relu,topk", "wide=", *llm, *text)
    assert 1 <= two["sent_bytes"] / two["least_bytes"] < 1.2
    assert two["differences"] == [0, 0]


@pytest.mark.slow
def test_two_devices_hold_half_of_a_wide_sae_each_and_send_one_sum(forked_devices, tmp_path):
    settings = ["sweep=", "wide=relu", "data.dim=256", "trainer.precision=fp32"]
    one, two = _measure_two_devices(forked_devices, tmp_path, *settings)
    assert 1 <= two["sent_bytes"] / two["least_bytes"] < 1.05
    assert two["held_bytes"] / one["held_bytes"] == pytest.approx(0.5, abs=0.01)
    assert two["differences"][0] < 1e-5  # in bf16, rounding makes up to 1e-2

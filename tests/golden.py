"""Hashes of the files that tiny runs write; a refactoring must not change any of them.

python tests/golden.py --out before.json       # in the tree as it was
python tests/golden.py --compare before.json   # in the tree as it is; words choose cases by name

Everything goes through train.py and analyze.py of the tree that this file lies in, in forks of a
process that has imported the libraries but nothing of `sae_lightning`. One thread, so that sums are
added up in one order. Left out: speeds, times, memory, versions, pages and what is printed.
"""

import argparse
import csv
import gc
import hashlib
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
    **{"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)},
}
LIBRARIES = (
    "torch lightning transformers datasets hydra sklearn.linear_model plotly.graph_objects "
    "tensorboard.backend.event_processing.event_accumulator torch.utils.tensorboard openai "
    "safetensors.torch pyarrow.parquet transformers.models.gpt_neox.modeling_gpt_neox yaml "
    "transformers.conversion_mapping hydra._internal.core_plugins.basic_sweeper scipy.io "
    "hydra.experimental.callback optuna submitit"
)

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix a potion"
TRAIN = (
    "llm=hf llm.name=../llm llm.device=cpu llm.batch=4 layer.index=1 data=text "
    "data.path=../text data.context=16 data.pool=256 data.held_out=0.34"
)
SHORT = (
    "trainer.tokens=2560 trainer.batch=64 trainer.accelerator=cpu trainer.log_every=4 "
    "trainer.checkpoint_every=640 eval.every=960 eval.tokens=150 model.features=48"
)
NUMBERS = {
    "fp32": "llm.dtype=float32 trainer.precision=fp32",
    "bf16": "llm.dtype=bfloat16 trainer.precision=bf16",
}
RUN, SWEEP = "train hydra.run.dir=run", "train -m hydra.sweep.dir=sweep"
MODELS = {
    **dict.fromkeys(("relu", "dense", "jumprelu", "gated"), ""),
    **dict.fromkeys(("topk", "batch_topk", "matryoshka"), "model.k=6"),
}
VARIANTS = {
    "relu resample": "callbacks.resample.every=640 callbacks.resample.tokens=128",
    "skip transcoder": "layer=transcoder model.skip=true",
    "max_norm": "data.max_norm=1.2",
}
MORE = {
    "relu target_l0": "loss.target_l0=10",
    "relu p": "loss.p=0.2 loss.l1=1e-2",
    "topk transcoder": "layer=transcoder model=topk model.k=6",
}
TASKS = (
    "overview tokens=1500",
    "features tokens=1200 neurons=relu",
    "evaluate",
    "theory tokens=1500",
    "probe tokens=1500 data=text data.context=16 data.path=../labelled.jsonl label=magic",
    "lens feature=[3,5] contexts=4",
    "lens direct=true",
    "steer feature=3 strength=[4,8] tokens=8",
    "explain tokens=1200 count=4 examples=8 scored=8 endpoint={server} explainer=small",
)
NOISE = re.compile("speed|second|time|version|memory")  # what differs from run to run


def cases() -> dict[str, list[str]]:
    """{name: command lines that run one after the other in a folder of their own}.

    `kill` before a command line kills it at its first checkpoint.
    """
    made: dict[str, list[str]] = {}
    for kind, numbers in NUMBERS.items():
        train = f"{TRAIN} {SHORT} {numbers}"
        for model, more in MODELS.items():
            made[f"{model} {kind}"] = [f"{RUN} {train} model={model} {more}"]
        variants = VARIANTS | (MORE if kind == "fp32" else {})
        for name, more in variants.items():
            made[f"{name} {kind}"] = [f"{RUN} {train} {more}"]
        for model in ("relu", "batch_topk", "jumprelu"):
            for products in ("dense", "sparse"):
                more = f"model={model} {MODELS[model]} trainer.products={products}"
                made[f"{model} {products} {kind}"] = [f"{RUN} {train} {more}"]
        cache = f"train {train} data.cache=true data.cache_folder=cache"
        made[f"cache {kind}"] = [
            f"{cache} hydra.run.dir=writes",
            f"{cache} hydra.run.dir=reads model=topk model.k=6".replace("batch=64", "batch=32"),
        ]
        wide = train.replace("features=48", "features=96")
        made[f"sweep {kind}"] = [
            f"{SWEEP} {wide} model={','.join(MODELS)}",
            "analyze run=sweep task=sweep",
        ]
        tasks = TASKS if kind == "fp32" else TASKS[:1]
        made[f"analyze {kind}"] = [
            f"{RUN} {train} loss.l1=1e-2",
            *(f"analyze run=run task={task}" for task in tasks),
        ]
    train = f"{TRAIN} {SHORT} {NUMBERS['fp32']}"
    layers = train.replace("layer.index=1 ", "")
    made["sweep layers"] = [f"{SWEEP} {layers} layer.index=0,1,2 layer=resid,mlp"]
    made["sweep one by one"] = [f"{SWEEP} {train} loss.l1=1e-3,1e-2 hydra/launcher=basic"]
    world = "data=synthetic data.concepts=40 data.dim=24 data.l0=3 data.pool=256"
    for more in ("model=relu", "model=topk model.k=3 data.correlation=0.3 data.hierarchy=0.5"):
        made[f"synthetic {more}"] = [f"{RUN} {world} {SHORT} trainer.precision=fp32 {more}"]
    long = train.replace("trainer.tokens=2560", "trainer.tokens=12800")
    made["killed run"] = [f"kill {RUN} {long}", "train resume=run"]
    made["killed sweep"] = [f"kill {SWEEP} {long} model=relu,gated", "train -m resume=sweep"]
    return made


# --- running ---------------------------------------------------------------------------------


def fork(work: Callable[[], None], log: Path | None = None) -> int:
    """Run `work` in a forked process, its output in `log`; return the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        # threads that look for a thread pool together, after a fork, may find none
        sys.modules["torch"].set_num_threads(1)
        if log:
            there = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(there, stream)
        work()
        code = 0
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(line: str, log: Path) -> None:
    """Run a command line in its own process; SystemExit with its log if it fails."""
    kill, words = line.startswith("kill "), line.removeprefix("kill ").split()
    script = ROOT / f"{words[0]}.py"

    def run() -> None:
        sys.argv = [str(script), *words[1:]]
        runpy.run_path(str(script), run_name="__main__")

    log.write_text(f"{line}\n")
    child = fork(run, log)
    done = 0
    while kill and not done and not list(Path().rglob("last.ckpt")):
        time.sleep(0.005)
        done, status = os.waitpid(child, os.WNOHANG)
    if kill and not done:
        os.kill(child, signal.SIGKILL)
    if not done:
        _, status = os.waitpid(child, 0)
    if status != (signal.SIGKILL if kill else 0):
        raise SystemExit(f"{line}\nended with status {status}:\n{log.read_text()[-5000:]}")


def answer(question: str) -> str:
    """A fixed answer of the explaining model to each question."""
    texts = re.findall(r"^(\d+)\. (.*)$", question, re.MULTILINE)
    if not texts:
        return f"Explanation: the word {WORDS.split()[len(question) % 16]}"
    return "\n".join(f"{n}: {'yes' if len(text) % 2 else 'no'}" for n, text in texts)


def case(name: str, lines: list[str], folder: Path) -> dict[str, str]:
    """Hashes of all files that the command lines of a case write."""
    sys.path.insert(1, str(ROOT / "tests"))
    from chat_server import ChatServer

    folder.mkdir()
    os.chdir(folder)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "home"), "OPENAI_API_KEY": "none"}
    found: dict[str, str] = {}
    with ChatServer(answer) as server:
        for line in lines:
            command(line.replace("{server}", server.url), folder / "log")
            # the next task writes files of the same names
            for analysis in [Path("run/analysis")] * line.startswith("analyze run=run"):
                task = line.partition("task=")[2]
                found |= {f"{name} / {task} / {k}": v for k, v in digests(analysis).items()}
                shutil.rmtree(analysis)
    return found | {f"{name} / {k}": v for k, v in digests(Path()).items()}


def prepare() -> None:
    """A tiny LLM, text and labelled text, in the current folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    ids = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.GPTNeoXConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
        **ids,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained("llm")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    core.train_from_iterator([WORDS], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained("llm")
    rng, words = random.Random(0), WORDS.split()
    Path("text").mkdir()
    for name in "abc":
        Path(f"text/{name}.txt").write_text(" ".join(rng.choices(words, k=600)))
    with open("labelled.jsonl", "w") as file:
        for i in range(90):
            text = " ".join(rng.choices(words[4 * (i % 3) : 4 * (i % 3) + 7], k=30))
            file.write(json.dumps({"text": text, "magic": "xyz"[i % 3]}) + "\n")


# --- hashing ---------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    """{"file / part": hash} of all files below `folder` whose content is deterministic."""
    found = {}
    for path in sorted(folder.rglob("*")):
        # a key that depends on where the LLM is, as the name of the cache's folder
        name = re.sub(r"\b[0-9a-f]{12,}\b", "*", str(path.relative_to(folder)))
        if not name.startswith("home") and path.is_file():
            for part, content in parts(path):
                key = f"{name} / {part}" if "events.out" not in name else f"{path.parent} / {part}"
                found[key] = digest(content)
    return found


def parts(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, content) of the parts of one file."""
    match path.suffix:
        case ".json":
            yield from top(json.loads(path.read_text()))
        case ".yaml":
            yield from top(importlib.import_module("yaml").safe_load(path.read_text()))
        case ".safetensors":
            yield "tensors", importlib.import_module("safetensors.torch").load_file(path)
        case ".pt" | ".ckpt":
            yield from top(sys.modules["torch"].load(path, map_location="cpu", weights_only=False))
        case ".parquet":
            table = importlib.import_module("pyarrow.parquet").read_table(path)
            for name in table.column_names:
                yield name, [str(table.schema.field(name).type), table[name].to_pylist()]
        case ".csv":
            header, *rows = csv.reader(path.read_text().splitlines())
            yield from top({name: [row[i] for row in rows] for i, name in enumerate(header)})
        case _ if "events.out" in path.name and path == min(path.parent.glob("events.out*")):
            yield from events(path.parent)


def top(content: Any) -> Iterator[tuple[str, Any]]:
    """Parts of a mapping by first key, tensors separate from other values."""
    if not isinstance(content, dict):
        yield "content", content
        return
    for key, value in content.items():
        if not NOISE.search(str(key)):
            flat = list(leaves(value))
            for kind, wanted in (("tensors", True), ("values", False)):
                chosen = [leaf for leaf in flat if hasattr(leaf[1], "untyped_storage") == wanted]
                if chosen:
                    yield f"{key} / {kind}", dict(chosen)


def leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of nested mappings and lists, unordered."""
    if isinstance(content, dict | list | tuple):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            if not NOISE.search(str(key)):
                yield from leaves(value, f"{path}/{key}")
        yield f"{path} length", len(content)
    else:
        yield path, content


def events(folder: Path) -> Iterator[tuple[str, Any]]:
    """The curves of a run; of points logged twice, by a killed run and its resumption, the last."""
    module = sys.modules["tensorboard.backend.event_processing.event_accumulator"]
    log = module.EventAccumulator(str(folder), {"scalars": 0, "histograms": 0})
    log.Reload()
    for tag in log.Tags()["scalars"]:
        if not NOISE.search(tag):
            yield f"curve {tag}", {e.step: e.value for e in log.Scalars(tag)}
    for tag in log.Tags()["histograms"]:
        yield f"histogram {tag}", {e.step: str(e.histogram_value) for e in log.Histograms(tag)}


def digest(content: Any) -> str:
    """A short hash of values and tensors that ignores paths below the temporary folder."""
    sha = hashlib.sha256()
    for name, value in sorted(leaves(content), key=lambda leaf: leaf[0]):
        if hasattr(value, "untyped_storage"):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            raw = value.detach().contiguous().reshape(-1).view(sys.modules["torch"].uint8)
            sha.update(raw.numpy().tobytes())
        else:
            plain = f"{name} {value!r}\n".replace(str(Path.cwd()), "<case>")
            sha.update(plain.replace(str(Path.cwd().parent), "<tmp>").encode())
    return sha.hexdigest()[:16]


# --- the command -----------------------------------------------------------------------------


def measure(names: list[str], jobs: int) -> dict[str, str]:
    """Hashes of the cases whose name contains one of the words."""
    chosen = {k: v for k, v in cases().items() if not names or any(n in k for n in names)}
    # The package may be installed from another tree: this one comes first.
    sys.path.insert(0, str(ROOT))
    for library in LIBRARIES.split():
        importlib.import_module(library)
    # built once a process and slow
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("gpt_neox")
    gc.freeze()  # pages that all forks share
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        here = Path(temporary).resolve()
        os.chdir(here)
        if os.waitpid(fork(prepare, here / "log"), 0)[1]:
            raise SystemExit((here / "log").read_text())
        running: dict[int, tuple[str, float]] = {}
        waiting, failed = list(chosen), []

        def work(name: str, number: int) -> None:
            found = case(name, chosen[name], here / f"case-{number}")
            (here / f"{number}.json").write_text(json.dumps(found))

        while waiting or running:
            while waiting and len(running) < jobs:
                name, number = waiting.pop(0), len(chosen) - len(waiting)
                child = fork(lambda name=name, number=number: work(name, number))
                running[child] = name, time.monotonic()
            child, status = os.wait()
            name, started = running.pop(child)
            if status:
                failed.append(name)
                waiting.clear()
            ended = "FAILED" if status else f"{time.monotonic() - started:.1f} s"
            sys.stderr.write(f"{name}: {ended}\n")
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}")
        files = sorted(here.glob("*.json"))
        found = {k: v for file in files for k, v in json.loads(file.read_text()).items()}
        os.chdir(ROOT)
    return dict(sorted(found.items()))


def compare(before: dict[str, str], now: dict[str, str], names: list[str]) -> int:
    """Print the differences by case and return their number."""
    before = {
        k: v for k, v in before.items() if not names or any(n in k.split(" / ")[0] for n in names)
    }
    different = sorted(k for k in before | now if before.get(k) != now.get(k))
    last = None
    for key in different:
        name, _, part = key.partition(" / ")
        if name != last:
            sys.stdout.write(f"{name}\n")
        last = name
        what = "differs" if key in before and key in now else "missing" if key in before else "new"
        sys.stdout.write(f"  {what:8} {part}\n")
    sys.stdout.write(f"{len(different)} of {len(before | now)} parts differ\n")
    return len(different)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="words of the names of cases; none for all")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--compare", type=Path, help="file to compare with")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    given = parser.parse_args()
    before = json.loads(given.compare.read_text()) if given.compare else None
    out = given.out and given.out.resolve()
    now = measure(given.names, given.jobs)
    text = json.dumps(now, indent=1) + "\n"
    if out:
        out.write_text(text)
    if before is not None:
        return int(compare(before, now, given.names) > 0)
    if not out:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

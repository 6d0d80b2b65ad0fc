"""Reads the curves that loggers have stored of a run, {curve: [(tokens, value)]}."""

import csv
import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

BLOCK, HEADER = 32768, 7  # of a LevelDB log, which Weights & Biases writes


class Stored(NamedTuple):
    """What a logger has stored of a run, or of one part of it."""

    name: str
    group: str | None
    settings: dict
    outcome: str
    curves: dict
    histograms: set = frozenset()


def read_csv(folder: Path) -> dict:
    curves = defaultdict(list)
    with open(folder / "csv" / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    curves[name].append((step, float(value)))
    return dict(curves)


def read_mlflow(uri: str, folder: Path) -> Stored:
    from mlflow.tracking import MlflowClient

    client, number = MlflowClient(uri), json.loads((folder / "mlflow.json").read_text())["run"]
    run = client.get_run(number)
    histories = {name: client.get_metric_history(number, name) for name in run.data.metrics}
    curves = {k: sorted((m.step, m.value) for m in points) for k, points in histories.items()}
    group = run.data.tags.get("sweep")
    return Stored(run.info.run_name, group, run.data.params, run.info.status, curves)


def read_wandb(folder: Path) -> list[Stored]:
    """The parts of a run, one for each time that it was started, in order."""
    number = json.loads((folder / "wandb.json").read_text())["run"]
    files = sorted(folder.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb"))
    assert len(files) == len(list(folder.glob("wandb/offline-run-*"))), "all of one run"
    return [_read_part(file) for file in files]


def _read_part(file: Path) -> Stored:
    from wandb.proto.wandb_internal_pb2 import Record

    curves, histograms, settings = defaultdict(list), set(), {}
    name = group = outcome = None
    for content in _read_records(file.read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name, group = record.run.display_name, record.run.run_group or None
            settings |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "config":
            settings |= {i.key: json.loads(i.value_json) for i in record.config.update}
        elif kind == "exit":
            outcome = str(record.exit.exit_code)
        elif kind == "history":
            row = {}
            for item in record.history.item:
                tag, *field = item.nested_key or [item.key]
                if field:
                    histograms.add(tag)
                else:
                    row[tag] = json.loads(item.value_json)
            assert row["tokens"] == row["_step"], "the x-axis"
            for tag, value in row.items():
                if tag != "tokens" and not tag.startswith("_"):
                    curves[tag].append((row["tokens"], value))
    return Stored(name, group, settings, outcome, dict(curves), histograms)


def _read_records(content: bytes) -> list[bytes]:
    """The records of a LevelDB log: blocks of fragments (crc, length, type: 1 is a whole record,
    2 to 4 the first, a middle and the last part), after a header of 7 bytes."""
    assert content[:4] == b":W&B"
    records, whole, at = [], b"", HEADER
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        whole = (whole if kind in (3, 4) else b"") + content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            records.append(whole)
    return records

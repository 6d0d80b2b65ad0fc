"""Runs on mixtures and chats resume exactly."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from test_run import interrupt
from tiny_llm import TEXT
from tiny_run import tiny_job

from sae_lightning.formats.export import WEIGHTS
from sae_lightning.runs import passes
from sae_lightning.runs.jobs import read_job
from sae_lightning.stream.local import LocalConfig

TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"


@pytest.mark.slow
def test_a_mixture_of_chats_that_was_stopped_ends_as_if_it_had_not_been(
    tiny_folder, tmp_path, monkeypatch
):
    llm = shutil.copytree(tiny_folder("llama"), tmp_path / "llm")
    Path(llm, "chat_template.jinja").write_text(TEMPLATE)
    talk = [{"role": role, "content": TEXT} for role in ("user", "assistant")]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 12))
    data = LocalConfig(
        path=str(tmp_path),
        weights={"a.jsonl": 3, "b.jsonl": 1},
        chat=True,
        assistant_only=True,
        context=16,
        pool=256,
        held_out=0.2,
    )
    whole, stopped = (
        tiny_job(str(llm), tmp_path, tmp_path / name, data=data) for name in ("whole", "stopped")
    )
    passes.train_jobs([whole])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, 23, lambda: os.kill(os.getpid(), signal.SIGTERM))
        passes.train_jobs([stopped])
    passes.train_jobs([replace(read_job(stopped.folder), resumed=True)])
    ends = [(job.folder / "sae" / WEIGHTS).read_bytes() for job in (whole, stopped)]
    assert ends[0] == ends[1]
    metrics = [json.loads((job.folder / "metrics.json").read_text()) for job in (whole, stopped)]
    assert metrics[0]["held_out"] == metrics[1]["held_out"]

"""Runs on mixtures and chats resume exactly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_run import metrics, stop_after, weights
from tiny_llm import TEXT
from tiny_run import tiny_job

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
    stop_after(monkeypatch, 23, stopped)
    passes.train_jobs([replace(read_job(stopped.folder), resumed=True)])
    assert weights(whole.folder) == weights(stopped.folder)
    assert metrics(whole.folder)["held_out"] == metrics(stopped.folder)["held_out"]

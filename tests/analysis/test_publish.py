"""An SAE is published on the hub with its settings, scores and a model card, and opened from it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer, connect
from huggingface_hub import HfApi, constants
from planted import save_planted
from tiny_run import tiny_job, write_text

from sae_lightning import terminal
from sae_lightning.analysis import publish_task
from sae_lightning.analysis.model_card import write_card
from sae_lightning.analysis.publish_task import PublishTask, hide_folders
from sae_lightning.analysis.subject import open_subject
from sae_lightning.errors import UserError
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.formats.saved_format import save_sae
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.runs import folders
from sae_lightning.sae import ARCHITECTURES, SAEConfig, build_sae
from sae_lightning.stream.plays import PlaysConfig

ROOT = Path(__file__).parents[2]
WEIGHTS = "sae/sae_weights.safetensors"
SETTINGS = {"llm": LLMConfig(name="smollm2"), "data": PlaysConfig(), "layer": LayerConfig(index=9)}


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.clear()
    connect(monkeypatch, server.url, tmp_path / "hub", TOKEN)
    return server


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Folders of an LLM and of an SAE."""
    return save_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def run(planted, tmp_path):
    """A run folder with scores, controls and a page."""
    write_text(tmp_path)
    job = tiny_job(str(planted[0]), tmp_path, tmp_path / "run", model=SAEConfig(features=32))
    job.overrides = [f"data.path={tmp_path}", "loss.l1=1e-2"]
    folders.begin_run(job)
    shutil.copytree(planted[1], job.folder / "sae")
    (job.folder / "checkpoints").mkdir()
    (job.folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    scores = {"l0": 31.26, "explained_variance": 0.7464, "ce_clean": 4.7, "ce_spliced": 4.8}
    scores |= {"ce_mean": 5.5, "ce_zero": 6.0, "ce_recovered": 0.923, "unfired": None}
    theory = {
        "overlap": {kind: {"99%": at} for kind, at in (("decoder", 0.785), ("random", 0.491))}
    }
    analysis = job.folder / "analysis"
    analysis.mkdir()
    (analysis / "overview.json").write_text(json.dumps({"evaluate": scores, "theory": theory}))
    (analysis / "index.html").write_text(f"<td>folder</td><td>{job.folder}</td><td>{tmp_path}</td>")
    return job.folder


def publish(run, **settings) -> None:
    settings = {"run": str(run), "task": "publish", "repo": "me/sae"} | SETTINGS | settings
    PublishTask(**settings).execute(["run", "task", "repo"])


def test_what_is_published_is_listed_and_opens_from_the_hub(hub, run, planted, capsys):
    publish(run)
    files = hub.repos["me/sae"].files
    assert sorted(files) == [
        *("README.md", "analysis/index.html", "analysis/overview.json", "config.yaml"),
        *("sae/cfg.json", WEIGHTS),
    ]
    output = capsys.readouterr().out
    assert all(name in output for name in files)
    assert f"published (private): {hub.url}/me/sae" in output
    assert "python analyze.py run=hub:me/sae" in output
    assert hub.repos["me/sae"].private
    llm = SETTINGS | {"llm": LLMConfig(name=str(planted[0]), device="cpu"), "seed": 0}
    subject = open_subject("hub:me/sae", llm, ["llm"])
    assert torch.equal(subject.sae.W_enc, load_sae(run).W_enc)
    assert subject.config.loss.l1 == 1e-2
    assert (subject.run, subject.results_folder) == ("hub:me/sae", Path("hub/me--sae/analysis"))


@pytest.mark.slow
def test_an_address_is_typed_like_a_folder(hub, run, planted, tmp_path):
    publish(run)
    asked = ["run=hub:me/sae@main", "task=text", "text=a potion", "llm=hf", "llm.device=cpu"]
    asked += [f"llm.name={planted[0]}", "data=text", f"data.path={tmp_path}/a.txt"]
    asked += ["data.context=16", "tokens=500"]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, ROOT / "analyze.py", *asked],
        cwd=tmp_path,
        env=environment | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "downloading hub:me/sae@main (MB): done" in done.stdout
    assert (tmp_path / "hub" / "me--sae@main" / "analysis" / "text.json").is_file()
    assert TOKEN not in done.stdout


def test_nothing_that_is_published_names_a_folder_of_this_machine_or_the_token(
    hub, run, tmp_path, capsys
):
    publish(run)
    for name, content in hub.repos["me/sae"].files.items():
        assert str(tmp_path).encode() not in content, name
        assert TOKEN.encode() not in content, name
    settings = yaml.safe_load(hub.repos["me/sae"].files["config.yaml"])
    assert settings["llm"]["name"] == "llm"
    assert settings["overrides"] == [f"data.path={tmp_path.name}", "loss.l1=1e-2"]
    output = capsys.readouterr()
    assert TOKEN not in output.out + output.err


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/my books", "my books"),
        ("data.path=/home/me/books", "data.path=books"),
        ("a=[/home/me/x.txt,~/y/z]", "a=[x.txt,z]"),
        ("google/gemma-2-2b", "google/gemma-2-2b"),
        ("llm.separator=</s>", "llm.separator=</s>"),
        ("https://a.org/b/c", "https://a.org/b/c"),
        ("[/INST] /", "[/INST] /"),
        ("/", "/"),
        ({"a": ["/x/y"], "b": 3}, {"a": ["y"], "b": 3}),
    ],
)
def test_paths_are_cut_and_names_are_not(value, shown):
    assert hide_folders(value) == shown


def test_the_card_has_scores_with_controls_and_what_the_sae_was_trained_on(hub, run):
    publish(run, licence="mit")
    card = hub.repos["me/sae"].files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["library_name"], head["license"]) == ("saelens", "mit")
    assert "saelens" in head["tags"]
    rows = [
        "| active features per token (L0) | 31.3 |  |",
        "| explained variance | 0.746 | the mean: 0 |",
        "| cross-entropy with the SAE (nats) | 4.800 | without the SAE: 4.700, mean: 5.500, "
        "zero: 6.000 |",
        "| cosine that 99 % of pairs of decoder rows are below | 0.79 | random: 0.49 |",
        "| tokens | 2,560 |",
        "| L1 coefficient | 0.01 |",
    ]
    assert [row for row in rows if row not in card] == []
    assert "features that never fired" not in card, "a number that was not measured"
    assert "It reads `blocks.1.hook_resid_post` of llm." in card


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_code_in_the_card_computes_what_the_sae_does(hub, tmp_path, name, skip):
    torch.manual_seed(0)
    config = ARCHITECTURES[name].config
    k = {"k": 3} if hasattr(config, "k") else {}
    config = config(name=name, features=64, skip=skip, **k)
    sae = build_sae(config, 6, 6)
    with torch.no_grad():
        for each in sae.parameters():
            each.add_(torch.randn_like(each) * 0.1)
    about = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    save_sae(tmp_path / "saved", sae, sae.weights(), about if skip else {})
    publish(tmp_path / "saved")
    card = hub.repos["me/sae"].files["README.md"].decode()
    blocks = [b for b in re.findall("```python\n(.*?)```", card, re.DOTALL) if "sae_lens" not in b]
    assert len(blocks) == 2
    x, saved = torch.randn(50, 6), load_sae(tmp_path / "saved")
    expected = saved(x)
    assert expected.features.any()
    for block in blocks:
        found = {"x": x}
        exec(block, found)  # noqa: S102
        assert torch.allclose(found["features"], expected.features, atol=1e-6), block
        assert torch.allclose(found["reconstruction"], expected.reconstruction, atol=1e-6), block


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_saelens_opens_it_as_the_card_says(hub, run):
    publish(run)
    card = hub.repos["me/sae"].files["README.md"].decode()
    (block,) = [b for b in re.findall("```python\n(.*?)```", card, re.DOTALL) if "sae_lens" in b]
    sae = load_sae(run)
    found = {"x": torch.randn(50, len(sae.W_enc))}
    exec(block, found)  # noqa: S102
    assert torch.allclose(found["features"], sae(found["x"]).features, atol=1e-5)


def test_the_card_of_an_sae_of_synthetic_concepts_names_no_llm():
    sae = build_sae(SAEConfig(features=12), 6, 6)
    sae.metadata = {"model_name": "none", "hook_name": "blocks.0.hook_resid_post"}
    card = write_card("me/sae", sae, {"data": {"concepts": 1024}, "seed": 0}, {}, None)
    assert "none" not in card
    assert "hook_resid_post" not in card
    assert "| synthetic concepts | 1,024 |" in card


def test_the_card_of_an_sae_of_stored_activations_names_no_text():
    sae = build_sae(SAEConfig(features=12), 6, 6)
    sae.metadata = {}
    data = {"kind": "activations", "path": "acts.npy"}
    card = write_card("me/sae", sae, {"data": data, "seed": 0}, {}, None)
    assert "| activations | acts.npy |" in card
    assert "| text |" not in card


def test_a_transcoder_that_saelens_misreads_is_not_said_to_open_there():
    sae = build_sae(ARCHITECTURES["topk"].config(features=12, k=2, skip=True), 6, 6)
    sae.metadata = {"note": "SAELens has no topk transcoder with a skip connection"}
    card = write_card("me/sae", sae, {}, {}, None)
    assert "sae_lens" not in card
    assert "SAELens has no topk transcoder with a skip connection." in card
    assert "It has not been measured." in card


class Terminal:
    def __init__(self, here: bool):
        self.here = here

    def isatty(self) -> bool:
        return self.here


class ClosedTerminal(io.StringIO):
    """Where Ctrl-D was typed."""

    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_nothing_becomes_public_unless_the_user_says_so(hub, run, monkeypatch):
    public = {"private": False, "licence": "mit"}
    monkeypatch.setattr(sys, "stdin", Terminal(False))
    with pytest.raises(UserError, match="there is no terminal: add ask=false"):
        publish(run, **public)
    monkeypatch.setattr(sys, "stdin", Terminal(True))
    monkeypatch.setattr(sys, "stdin", ClosedTerminal())
    with pytest.raises(UserError, match="nothing was uploaded"):
        publish(run, **public)
    answers = ["", "no", "y"]
    monkeypatch.setattr("builtins.input", lambda question: answers.pop(0))
    for _ in range(2):
        with pytest.raises(UserError, match="nothing was uploaded"):
            publish(run, **public)
    assert hub.repos == {}
    publish(run, **public)
    assert not hub.repos["me/sae"].private
    publish(run, **public, ask=False)
    assert len(hub.repos["me/sae"].commits) == 3


@pytest.mark.parametrize(
    ("there", "asked", "told"),
    [
        (False, {}, "repo=me/sae is public, so everybody would see these files"),
        (True, {"private": False, "licence": "mit"}, "is private, and uploading does not change"),
    ],
)
def test_a_repository_that_is_there_keeps_its_visibility(hub, run, there, asked, told):
    hub.add("me/sae", {}, private=there)
    with pytest.raises(UserError, match=told):
        publish(run, **asked)
    assert hub.repos["me/sae"].files == {}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"repo": None}, "repo=None: give a repository on the hub, as repo=owner/name"),
        ({"repo": "sae"}, "repo=sae: give a repository"),
        ({"private": False}, "private=false needs a licence: give licence=mit"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_at_once(settings, told):
    with pytest.raises(UserError, match=told):
        publish("run", **settings)


def test_without_a_token_nothing_is_read(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="repo=me/sae: you are not logged in at the hub; run: hf"):
        publish("nowhere")
    assert hub.requests == []


def test_a_token_that_the_hub_refuses_is_not_shown(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"repo=me/sae: the hub refuses your token \(401\)") as no:
        publish(run)
    assert "hf_wrong" not in str(no.value)


@pytest.mark.parametrize(
    ("request_", "status", "told"),
    [
        ("POST /api/repos/create", 403, r"your token may not do this \(403\); log in with one"),
        ("POST .*/commit/", 500, "the hub answers 500; try again later"),
        ("PUT /lfs", 403, "your token may not do this"),
    ],
)
def test_an_upload_that_fails_leaves_no_half_of_a_commit(hub, run, request_, status, told):
    hub.fail(request_, status, times=100)
    with pytest.raises(UserError, match=told) as no:
        publish(run)
    assert "\n" not in str(no.value)
    assert all(repo.files == {} for repo in hub.repos.values())


def test_a_terminal_shows_the_bytes_that_are_uploaded(hub, run, monkeypatch, capfd):
    """The client's bar, and none of ours, which would overwrite it."""
    publish(run)
    assert not capfd.readouterr().err
    monkeypatch.setattr(terminal.Terminal, "is_terminal", True)
    send, live = HfApi.create_commit, []
    monkeypatch.setattr(
        HfApi, "create_commit", lambda *a, **k: live.extend(terminal._live) or send(*a, **k)
    )
    publish(run, repo="me/again")
    assert live == []
    assert re.search(r"100%.*6\.\d\dk/6\.\d\dk .*B/s", capfd.readouterr().err)


def test_a_damaged_file_of_scores_is_told_in_one_line(hub, run):
    (run / "analysis" / "evaluate.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluate\.json is damaged: it cannot be read as JSON"):
        publish(run)
    assert hub.repos == {}


def test_what_a_link_leads_to_is_not_uploaded(hub, run, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (run / "analysis" / "index.html").unlink()
    (run / "analysis" / "index.html").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="index.html is a symbolic link to a file elsewhere"):
        publish(run)
    assert hub.repos == {}


def test_what_a_link_in_the_sae_folder_leads_to_is_not_uploaded(hub, run, tmp_path):
    """The folder can be given as the run's or as the SAE's own."""
    (run / "sae" / "cfg.json").rename(tmp_path / "secret")
    (run / "sae" / "cfg.json").symlink_to(tmp_path / "secret")
    for folder in (run, run / "sae"):
        with pytest.raises(UserError, match="cfg.json is a symbolic link to a file elsewhere"):
            publish(folder)
    assert hub.repos == {}


def test_another_tools_folder_has_to_be_converted_first(hub, planted, tmp_path):
    """SAELens' own, too: its encoder may read x - b_dec, which the code in the card does not."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sae_weights.safetensors").write_bytes(b"llamascopium's")
    saelens = shutil.copytree(planted[1], tmp_path / "saelens")
    cfg = json.loads((saelens / "cfg.json").read_text())
    del cfg["sae_lightning"]
    (saelens / "cfg.json").write_text(json.dumps(cfg))
    for folder in (tmp_path / "other", saelens):
        with pytest.raises(UserError, match="task=export format=saelens"):
            publish_task.collect_files(folder)


def test_a_home_folder_at_the_root_leaves_the_page_as_it_is(hub, run, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    publish(run)
    assert b"</td><td>run</td>" in hub.repos["me/sae"].files["analysis/index.html"]


def test_the_card_says_trained_only_of_what_was_trained_here():
    sae = build_sae(SAEConfig(features=12), 6, 6)
    sae.metadata = {}
    assert "saved with sae_lightning." in write_card("me/sae", sae, {}, {}, None)
    sae.metadata = {"sae_lightning": {}}
    assert "trained with sae_lightning." in write_card("me/sae", sae, {}, {}, None)


def test_a_sae_on_the_hub_is_published_again_under_another_name(hub, run):
    publish(run)
    publish("hub:me/sae", repo="me/copy")
    assert hub.repos["me/copy"].files[WEIGHTS] == hub.repos["me/sae"].files[WEIGHTS]
    assert not (Path(constants.HF_HUB_CACHE) / "models--me--copy").exists()

"""SAEs are opened from a hub: only the needed files, once, and every failure is one line."""

import time
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer, connect
from huggingface_hub import constants

from sae_lightning import load_sae
from sae_lightning.errors import UserError
from sae_lightning.formats.export import save_sae
from sae_lightning.formats.fetch import fetch_saved
from sae_lightning.sae import SAEConfig, build_sae

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        connect(monkeypatch, server.url, tmp_path / "hub")
        monkeypatch.setattr(time, "sleep", server.slept.append)
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved SAE."""
    sae = build_sae(SAEConfig(name="relu", features=6), 4, 4)
    save_sae(tmp_path / "saved", sae, sae.weights(), {"model_name": "gpt2"})
    return tmp_path / "saved"


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CFG, WEIGHTS)}


def test_a_local_path_stays_as_it_is(tmp_path):
    assert fetch_saved(str(tmp_path / "no" / "folder")) == tmp_path / "no" / "folder"


def test_an_sae_is_opened_from_the_hub_with_only_the_files_that_it_needs(hub, folder):
    others = {"README.md": b"x", "layer_2/notes.txt": b"x", "layer_2/optimizer.pt": b"x"}
    hub.add("me/saes", others | {f"layer_2/{name}": data for name, data in read(folder).items()})
    sae, local = load_sae("hub:me/saes/layer_2"), load_sae(folder)
    assert torch.equal(sae.W_enc, local.W_enc)
    assert hub.count("GET /me/saes/resolve") == 2
    assert {file.name for file in fetch_saved("hub:me/saes/layer_2").iterdir()} == {CFG, WEIGHTS}


def test_a_file_is_opened_from_the_hub_by_its_name(hub, folder):
    hub.add("me/saes", {f"layer_2/{name}": data for name, data in read(folder).items()})
    file = fetch_saved(f"hub:me/saes/layer_2/{WEIGHTS}")
    assert file.read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (file.parent / CFG).is_file()


def test_what_is_there_is_not_downloaded_again(hub, folder):
    hub.add("me/sae", folder)
    first = fetch_saved("hub:me/sae")
    assert fetch_saved("hub:me/sae") == first
    assert hub.count("GET /me/sae/resolve") == 2


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_copy_in_the_cache_is_opened_without_a_connection(hub, folder, monkeypatch, revision):
    hub.add("me/sae", folder)
    first = fetch_saved(f"hub:me/sae@{revision}")
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_saved(f"hub:me/sae@{revision}") == first
    assert len(hub.requests) == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert fetch_saved(f"hub:me/sae@{revision}") == first


def test_a_commit_that_is_there_needs_no_request(hub, folder):
    commit = hub.add("me/sae", folder).name_commit(0)
    first = fetch_saved(f"hub:me/sae@{commit}")
    before = len(hub.requests)
    assert fetch_saved(f"hub:me/sae@{commit}") == first
    assert len(hub.requests) == before


def test_a_new_commit_is_downloaded_and_an_old_revision_stays(hub, folder):
    hub.add("me/sae", folder)
    old = fetch_saved("hub:me/sae")
    hub.add("me/sae", read(folder) | {CFG: (folder / CFG).read_bytes() + b" "})
    new = fetch_saved("hub:me/sae")
    assert (new / CFG).read_bytes() == (old / CFG).read_bytes() + b" "
    assert fetch_saved("hub:me/sae@v1") == old
    assert hub.count("GET /me/sae/resolve") == 3  # the weights are the same


def test_a_token_opens_a_private_repository_and_is_not_shown(hub, folder, monkeypatch):
    hub.add("me/sae", folder, private=True)
    with pytest.raises(UserError, match="no repository me/sae, or it is private; .* hf auth login"):
        fetch_saved("hub:me/sae")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"refuses your token \(401\); log in again") as no:
        fetch_saved("hub:me/sae")
    assert "hf_wrong" not in str(no.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (fetch_saved("hub:me/sae") / CFG).is_file()
    assert hub.tokens == {None, "hf_wrong", TOKEN}


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hub:me/other", "hub:me/other: there is no repository me/other, or it is private; check"),
        ("hub:me/sae@v7", "me/sae has no revision v7; give a branch, a tag or a commit after @"),
        ("hub:me/sae/layer_9", "me/sae has no such file or folder at revision main; leave out"),
        ("hub:me/sae/docs", "hub:me/sae/docs holds no saved SAE"),
        ("hub:me/gated", "gated; accept its terms at http://.*/me/gated, then log in: hf auth"),
        ("hub:me", "hub:me: write hub:<owner>/<name>"),
        ("hub:me/sae/../x", "write hub:<owner>/<name>"),
        ("hub:me/sae@", "write hub:<owner>/<name>"),
        ("hub:me--x/sae", "me--x/sae is no name of a repository; write owner/name"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_in_one_line(hub, folder, address, told):
    hub.add("me/sae", read(folder) | {"docs/a.txt": b"x"})
    hub.add("me/gated", folder, gated=True)
    with pytest.raises(UserError, match=told) as no:
        fetch_saved(address)
    assert "\n" not in str(no.value)


def test_the_folders_of_several_saes_are_named(hub, folder):
    hub.add("me/saes", {f"l{i}/{n}": data for i in range(5) for n, data in read(folder).items()})
    with pytest.raises(
        UserError, match=r"give one of hub:me/saes/l0@v1, hub:me/saes/l1@v1, .*l2@v1 \(5 in all\)"
    ):
        fetch_saved("hub:me/saes@v1")


def test_a_dropped_connection_is_resumed_where_it_broke(hub, folder):
    hub.add("me/sae", folder)
    hub.fail(f"GET .*{WEIGHTS}", "drop", times=2)
    assert (fetch_saved("hub:me/sae") / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert hub.count(f"GET .*{WEIGHTS}") == 3


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("shorten", "the download ended early, and nothing was kept; run the same command again"),
        ("empty", "no connection to http://127.0.0.1:.*, or it broke off"),
        (503, "the hub answers 503; try again later"),
    ],
)
def test_a_truncated_file_is_never_used(hub, folder, kind, told):
    hub.add("me/sae", folder)
    hub.fail(f"GET .*{WEIGHTS}", kind, times=100)
    with pytest.raises(UserError, match=told) as no:
        load_sae("hub:me/sae")
    assert "\n" not in str(no.value)
    assert not [*Path(constants.HF_HUB_CACHE).rglob("*.incomplete")]
    hub.faults.clear()
    assert load_sae("hub:me/sae").config.features == 6


@pytest.mark.parametrize("request_", ["GET /api/models/me/sae/revision", f"GET .*{WEIGHTS}"])
def test_too_many_requests_wait_as_long_as_the_hub_says(hub, folder, request_):
    hub.add("me/sae", folder)
    hub.fail(request_, 429, retry_after="7")
    assert (fetch_saved("hub:me/sae") / WEIGHTS).is_file()
    assert [round(seconds) for seconds in hub.slept] in ([7], [8])


@pytest.mark.parametrize(
    ("headers", "seconds"), [({"retry_after": "300"}, 300), ({"ratelimit": '"api";r=0;t=90'}, 90)]
)
def test_a_hub_that_asks_to_wait_for_minutes_is_not_waited_for(hub, folder, headers, seconds):
    hub.add("me/sae", folder)
    hub.fail(f"GET .*{WEIGHTS}", 429, **headers)
    with pytest.raises(UserError, match=rf"\(429\); try again in {seconds} s, or log in"):
        fetch_saved("hub:me/sae")
    assert hub.slept == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_does_not_keep_a_cached_copy_from_being_used(hub, folder, status):
    hub.add("me/sae", folder)
    first = fetch_saved("hub:me/sae")
    hub.fail("GET /api/models", status, times=100)
    assert fetch_saved("hub:me/sae") == first


def test_without_a_connection_or_a_copy_there_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hub:me/sae: no connection to http://127.0.0.1:9, or"):
        fetch_saved("hub:me/sae")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not downloaded before, and HF_HUB_OFFLINE=1 forbids"):
        fetch_saved("hub:me/sae")

"""SAEs are opened from a hub: only the needed files, once, and every failure is one line."""

import re
import time
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer, connect
from huggingface_hub import constants

from sae_lightning import load_sae
from sae_lightning.errors import UserError
from sae_lightning.formats.fetch import fetch_saved, parse_address
from sae_lightning.formats.format import Origin
from sae_lightning.formats.saved_format import save_sae
from sae_lightning.formats.suites import QWEN_MODELS, choose_path, expand_suite
from sae_lightning.formats.write_sae import write_sae
from sae_lightning.sae import ARCHITECTURES, SAEConfig, build_sae

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.clear()
    connect(monkeypatch, server.url, tmp_path / "hub")
    monkeypatch.setattr(time, "sleep", server.slept.append)
    return server


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


def test_settings_above_the_folder_are_downloaded_where_a_format_has_them(hub, tmp_path):
    """sparsify says in a file above all its SAEs which LLM they read."""
    sae = build_sae(ARCHITECTURES["topk"].config(name="topk", features=6, k=2), 4, 4)
    (tmp_path / "saes").mkdir()
    write_sae("sparsify", sae, Origin({}, None, ""), tmp_path / "saes" / "layers.3")
    hub.add("me/saes", tmp_path / "saes")
    hub.repos["me/saes"].files["config.json"] = b'{"model": "EleutherAI/pythia-70m"}'
    metadata = load_sae("hub:me/saes/layers.3").metadata
    assert (metadata["model_name"], metadata["hook_name"]) == ("EleutherAI/pythia-70m", "layers.3")


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
        ("hub:me--x/sae", "me--x/sae is not the name of a repository; write owner/name"),
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


@pytest.mark.parametrize("request_", ["GET /api/models", "HEAD .*resolve"])
def test_a_login_page_in_between_is_told_in_one_line(hub, folder, request_):
    hub.add("me/sae", folder)
    hub.fail(request_, "html", times=100)
    with pytest.raises(UserError, match="does not answer as a hub does; is a login page in"):
        fetch_saved("hub:me/sae")


def test_without_a_connection_or_a_copy_there_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hub:me/sae: no connection to http://127.0.0.1:9, or"):
        fetch_saved("hub:me/sae")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 forbids requests, and there"):
        fetch_saved("hub:me/sae")


LLAMA = "Llama3_1-8B-Base-L15R-8x"
GEMMA_2 = "resid_post/layer_13_width_16k_l0_medium"
LAYOUTS = {  # address -> repository, its files, those that are needed
    "hub:gemma-scope/2b/res/20/16k": (
        "google/gemma-scope-2b-pt-res",
        "README.md layer_20/width_16k/average_l0_71/params.npz",
        "layer_20/width_16k/average_l0_71/params.npz",
    ),
    "hub:gemma-scope-2/1b/res/13/16k": (
        "google/gemma-scope-2-1b-pt",
        f"{GEMMA_2}/params.safetensors {GEMMA_2}/config.json {GEMMA_2}/plot.png config.json",
        f"{GEMMA_2}/params.safetensors {GEMMA_2}/config.json",
    ),
    "hub:llama-scope/res/15/8x": (
        "fnlp/Llama3_1-8B-Base-LXR-8x",
        f"{LLAMA}/checkpoints/final.safetensors {LLAMA}/hyperparams.json {LLAMA}/lm_config.json",
        f"{LLAMA}/checkpoints/final.safetensors {LLAMA}/hyperparams.json",
    ),
    "hub:qwen-scope/qwen3-8b/1": (
        "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_100",
        "README.md layer0.sae.pt layer1.sae.pt layer10.sae.pt",
        "layer1.sae.pt",
    ),
    "hub:gpt2-res-jb/8": (
        "jbloom/GPT2-Small-SAEs-Reformatted",
        " ".join(f"blocks.8.hook_resid_pre/{name}" for name in (CFG, WEIGHTS, "sparsity.pt")),
        " ".join(f"blocks.8.hook_resid_pre/{name}" for name in (CFG, WEIGHTS)),
    ),
    "hub:Goodfire/Llama-3.1-8B-Instruct-SAE-l19": (
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "README.md Llama-3.1-8B-Instruct-SAE-l19.pth",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
    ),
    "hub:me/dictionaries/resid_post_layer_3/trainer_1": (
        "me/dictionaries",
        "resid_post_layer_3/trainer_1/ae.pt resid_post_layer_3/trainer_1/config.json "
        "resid_post_layer_3/trainer_1/eval_results.json resid_post_layer_3/trainer_2/ae.pt",
        "resid_post_layer_3/trainer_1/ae.pt resid_post_layer_3/trainer_1/config.json",
    ),
    "hub:me/run": (
        "me/run",
        f"README.md config.yaml metrics.json sae/{CFG} sae/{WEIGHTS} analysis/index.html",
        f"config.yaml sae/{CFG} sae/{WEIGHTS}",
    ),
}


@pytest.mark.parametrize("address", LAYOUTS)
def test_of_every_suite_only_the_needed_files_are_downloaded(hub, address):
    repo, files, needed = LAYOUTS[address]
    hub.add(repo, {name: name.encode() for name in files.split()})
    fetch_saved(address)
    asked = {r.split("/", 5)[-1] for r in hub.requests if r.startswith(f"GET /{repo}/resolve/")}
    assert asked == {*needed.split()}


@pytest.fixture
def gemma(hub, folder):
    """Folders as Gemma Scope has them, in our format."""
    for width, numbers in {"16k": (22, 38, 71, 139, 294), "65k": (64, 136)}.items():
        parts = {f"layer_20/width_{width}/average_l0_{number}": number for number in numbers}
        files = {f"{part}/{name}": data for part in parts for name, data in read(folder).items()}
        hub.add("google/gemma-scope-2b-pt-res", files)
    repo = hub.repos["google/gemma-scope-2b-pt-res"]
    repo.commits = [repo.commits[0] | repo.commits[1]]
    return hub


@pytest.mark.parametrize(("width", "l0"), [("16k", 71), ("65k", 64)])
def test_a_short_name_stands_for_the_l0_nearest_to_100(gemma, monkeypatch, capsys, width, l0):
    """71 is nearer than 139; of 64 and 136 it is the sparser one."""
    name = f"hub:gemma-scope/2b/res/20/{width}"
    first = fetch_saved(name)
    assert first.parts[-3:] == ("layer_20", f"width_{width}", f"average_l0_{l0}")
    assert gemma.count("GET .*resolve") == 2
    whole = f"hub:google/gemma-scope-2b-pt-res/layer_20/width_{width}/average_l0_{l0}"
    assert f"{name} is {whole}" in capsys.readouterr().out.replace("\n", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_saved(name) == first


def test_of_several_places_the_first_that_exists_is_meant(hub, folder):
    """Layer 13 has an L0 of about 60, layer 5 does not."""
    parts = ("resid_post/layer_13_width_16k_l0_medium", "resid_post_all/layer_5_width_16k_l0_big")
    files = {f"{part}/{name}": data for part in parts for name, data in read(folder).items()}
    hub.add("google/gemma-scope-2-1b-pt", files)
    for layer, part in zip((13, 5), parts, strict=True):
        found = fetch_saved(f"hub:gemma-scope-2/1b/res/{layer}/16k")
        assert found.as_posix().endswith(part)
    with pytest.raises(
        UserError, match="gemma-scope-2-1b-pt has no resid_post/layer_6_width_16k_l0_medium and no"
    ):
        fetch_saved("hub:gemma-scope-2/1b/res/6/16k")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "gemma-scope/3b/res/20/16k",
            "gemma-scope has no model 3b; choose from 2b, 9b, 9b-it, 27b",
        ),
        ("gemma-scope/2b/res/20", "write hub:gemma-scope/<model>/<site>/<layer>/<width>"),
        ("qwen-scope/qwen3-8b/1/2", "write hub:qwen-scope/<model>/<layer>"),
        ("llama-scope", "write hub:llama-scope/<site>/<layer>/<expansion>"),
        ("gpt2-res-jb/8@", "8@: write hub:<owner>/<name>"),
        ("gpt2-res-jb/*", r"/\*: write hub:<owner>/<name>"),
        ("gemma-scope/2b/res/../16k", "write hub:<owner>/<name>"),
    ],
)
def test_a_short_name_with_other_parts_is_refused(name, told):
    with pytest.raises(UserError, match=told):
        parse_address(f"hub:{name}")


EXPANDED = {
    "gemma-scope/9b-it/res/9/16k": "google/gemma-scope-9b-it-res layer_9/width_16k/average_l0_*",
    "gemma-scope/2b/transcoders/5/16k": "google/gemma-scope-2b-pt-transcoders layer_5/width_16k/"
    "average_l0_*",
    "llama-scope/res/15/8x": "fnlp/Llama3_1-8B-Base-LXR-8x Llama3_1-8B-Base-L15R-8x",
    "llama-scope/transcoders/3/32x": "fnlp/Llama3_1-8B-Base-LXTC-32x Llama3_1-8B-Base-L3TC-32x",
    "qwen-scope/qwen3-8b/12": "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_100 layer12.sae.pt",
    "gpt2-res-jb/8": "jbloom/GPT2-Small-SAEs-Reformatted blocks.8.hook_resid_pre",
}


@pytest.mark.parametrize("name", EXPANDED)
def test_a_short_name_stands_for_an_address(name):
    place = parse_address(f"hub:{name}@v1")
    assert [place.repo, *place.paths] == EXPANDED[name].split()
    assert place.revision == "v1"


@pytest.fixture(scope="module")
def listed() -> dict[str, tuple[str, list[str]]]:
    """Release of SAELens' list -> repository and paths; read line by line, as YAML takes 20 s."""
    file, releases = Path(find_spec("sae_lens").origin).with_name("pretrained_saes.yaml"), {}
    for line in file.read_text().splitlines():
        if match := re.fullmatch(r"(\S+):", line):
            release, repo, paths = match[1], [], []
            releases[release] = repo, paths
        elif match := re.fullmatch(r"  repo_id: (\S+)", line):
            repo.append(match[1])
        elif match := re.fullmatch(r"[ -]+path: (\S+)", line):
            paths.append(match[1])
    return {release: (repo[0], paths) for release, (repo, paths) in releases.items() if repo}


def test_short_names_are_those_of_saelens(listed):
    """Every repository and path that a name may stand for is in SAELens' list."""
    names = [name for name in EXPANDED if "llama-scope/transcoders" not in name]  # not in the list
    names += [f"qwen-scope/{model}/0" for model in QWEN_MODELS]
    names += [f"gemma-scope-2/1b/{site}/13/16k" for site in ("res", "att", "mlp", "transcoders")]
    for name in names:
        wanted, paths = expand_suite(name)
        known = [path for repo, found in listed.values() if repo == wanted for path in found]
        assert any(fnmatch(path, paths[0]) for path in known), name


def test_the_l0_nearest_to_100_is_the_canonical_one_of_saelens(listed):
    chosen, canonical = [], []
    for release, (_, paths) in listed.items():
        if not release.endswith("-canonical"):
            continue
        others = listed[release.removesuffix("-canonical")][1]

        def list_folder(folder: str, others=others) -> list[str]:
            return [path for path in others if path.startswith(f"{folder}/")]

        patterns = [str(Path(path).with_name("average_l0_*")) for path in paths]
        chosen += [choose_path((pattern,), list_folder) for pattern in patterns]
        canonical += paths
    differing = [pair for pair in zip(chosen, canonical, strict=True) if pair[0] != pair[1]]
    assert len(canonical) == 429
    folder = "layer_27/width_16k"  # of gemma-scope-9b-pt-att: 64 and 136 are equally near
    assert differing == [(f"{folder}/average_l0_64", f"{folder}/average_l0_136")]


def test_the_addresses_on_the_page_can_be_read():
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text("utf8")
    addresses = re.findall(r"hub:[^\s`\"<]+/[^\s`\"<]+(?=[\s`\"])", page)
    assert len(addresses) > 3
    assert all(parse_address(address).repo.count("/") == 1 for address in addresses)

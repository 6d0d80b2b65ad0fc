"""The config tree: every preset composes, the two halves are cut where they should be, and a
run folder's config.yaml says all there is to say."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException

from sae_lightning.errors import UserError
from sae_lightning.llm.load import Dtype
from sae_lightning.llm.sites import Kind
from sae_lightning.report.experiments import identify_experiment
from sae_lightning.runs.config import Config, find_conf_folder
from sae_lightning.runs.jobs import (
    CONFIG_FILE,
    Job,
    format_config,
    make_job,
    pick_run_folder,
    read_job,
    read_overrides,
)
from sae_lightning.runs.schemas import name_job_folder
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.stream import SOURCES
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.stream.synthetic import SyntheticConfig
from sae_lightning.training.settings import EvalConfig, Normalization, Precision

CONF = Path(find_conf_folder())
PRESETS = sorted(str(p.relative_to(CONF).with_suffix("")) for p in CONF.glob("*/*.yaml"))
# What a preset leaves to the user, and an example of it.
LEFT_OPEN = {
    "llm/hf": ["llm.name=gpt2", "layer.index=2"],
    "data/text": ["data.path=my.txt"],
    "data/activations": ["data.path=acts"],
    "data/hub": ["data.name=owner/name"],
}

pytestmark = pytest.mark.usefixtures("hydra")


def test_an_experiment_is_all_settings_but_seeds_controls_and_what_changes_at_most_rounding():
    own = make("model.features=64").to_flat_dict()

    def list_compared(group: str) -> set[str]:
        names = [name for name in own if name.startswith(f"{group}.")]
        found = identify_experiment(own)
        return {name for name in names if identify_experiment(own | {name: "other"}) != found}

    assert list_compared("trainer") == {"trainer.tokens", "trainer.batch", "trainer.precision"}
    assert list_compared("eval") == {"eval.tokens", "eval.loss_tokens"}
    assert not {"llm.device", "llm.attn"} & list_compared("llm") and "llm.dtype" in list_compared(
        "llm"
    )
    assert not {"data.cache", "data.cache_folder", "data.seed"} & list_compared("data")
    kept = {name for name in own if name.startswith("model.")} - list_compared("model")
    assert kept == {"model.seed", "model.control"}


def make(*overrides: str) -> Config:
    """The config of a command line."""
    return compose_job(*overrides).config


@cache
def compose_job(*overrides: str) -> Job:
    return make_job(compose("config", list(overrides)), Path("folder"), list(overrides))


def preset(name: str) -> list[str]:
    """Overrides that choose `group/preset`, complete enough to compose."""
    group, choice = name.split("/")
    goes_with = [f"model={choice}"] if group == "loss" else []
    goes_with += ["data=synthetic"] if name == "llm/none" else []
    goes_with += ["logger.wandb.offline=true"] if name == "logger/wandb" else []  # no login
    return [name.replace("/", "="), *goes_with, *LEFT_OPEN.get(name, [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes(name):
    assert isinstance(make(*preset(name)), Config)


@pytest.mark.parametrize("name", sorted(LEFT_OPEN))
def test_a_preset_that_leaves_something_open_says_what(name):
    for left_out in LEFT_OPEN[name]:
        setting = left_out.split("=")[0]
        with pytest.raises(UserError, match=f"^{setting} is not set: give {setting}=... (\\(.*)$"):
            make(*(o for o in preset(name) if o != left_out))


def test_a_dict_that_leaves_something_open_says_what():
    with pytest.raises(UserError, match=r"^llm\.load\.a is not set: give llm\.load\.a=\.\.\.$"):
        make("+llm.load.a=???")


def test_without_options_it_is_the_packaged_llm_and_text():
    config = make()
    assert (config.llm.name, config.layer.index, config.layer.source) == ("smollm2", 9, Kind.resid)
    assert type(config.data) is PlaysConfig
    assert (config.model.name, config.model.features) == ("relu", 10_000)
    assert type(config.loss) is ReLULoss


def test_an_option_of_a_group_is_a_file_of_its_folder_or_an_architecture():
    """Schemas stay out of `python train.py --help`'s lists and of `model=...`."""
    loader = GlobalHydra.instance().config_loader()
    groups = {folder.name for folder in CONF.iterdir() if any(folder.glob("*.yaml"))}
    assert {"llm", "data", "layer", "loss", "optim", "trainer"} <= groups
    for group in groups | {"model"}:
        options = {file.stem for file in (CONF / group).glob("*.yaml")}
        options |= ARCHITECTURES.keys() if group in ("model", "loss") else set()
        assert sorted(loader.get_group_options(group)) == sorted(options)


@pytest.mark.slow
def test_every_architecture_and_every_source_has_a_schema_and_is_an_option():
    known = ConfigStore.instance()
    for group, table in (("model", ARCHITECTURES), ("loss", ARCHITECTURES), ("data", SOURCES)):
        assert set(known.list(f"schema/{group}")) == {f"{name}.yaml" for name in table}
    for name in ARCHITECTURES:
        config = make(f"model={name}", "seed=3")
        assert (config.model.name, config.model.seed) == (name, 3)
        assert type(config.loss) is ARCHITECTURES[name].loss


@pytest.mark.slow
def test_an_llm_brings_a_layer_and_the_user_may_choose_another():
    assert make("llm=gpt2").layer.index == 8
    assert make("llm=gpt2", "layer.index=3", "layer=mlp").layer.index == 3
    layer = make("llm=gpt2", "layer=mlp").layer
    assert (layer.source, layer.target) == (Kind.mlp, None)
    layer = make("llm=gpt2", "layer=transcoder").layer
    assert (layer.index, layer.source, layer.target) == (8, Kind.mlp_in, Kind.mlp)


@pytest.mark.slow
def test_synthetic_data_brings_no_llm_and_an_objective_that_it_has():
    config = make("data=synthetic", "seed=3")
    assert (config.llm.name, config.layer.index, config.sweep.objective) == ("none", 0, "recovered")
    assert (type(config.data), config.data.seed) == (SyntheticConfig, 1_000_000)
    assert make("data=synthetic", "trainer=smoke").data.pool == 4096
    assert make("data=synthetic", "llm.device=cpu", "llm.dtype=float32").llm.device == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=synthetic", "llm=gpt2"], r"llm\.name=openai-community/gpt2 has no meaning with"),
        (["llm=gpt2", "data=synthetic"], r"llm\.name=openai-community/gpt2 has no meaning with"),
        (["data=synthetic", "llm.batch=4"], r"llm\.batch=4 has no meaning"),
        (["data=synthetic", "llm.dtype=bfloat16"], r"llm\.dtype=bfloat16 has no meaning"),
        (["data=synthetic", "layer.index=3"], r"layer\.index=3 has no meaning"),
        (["data=synthetic", "layer=mlp"], r"layer\.source=mlp has no meaning"),
        (["data=synthetic", "layer=transcoder"], r"layer\.source=mlp_in has no meaning"),
        (["llm=none"], r"llm=none: text needs an LLM"),
        (["llm=none", "data=tinystories"], r"llm=none: text needs an LLM"),
        (
            ["data=synthetic", "sweep.objective=kl"],
            r"sweep\.objective=kl is not measured on data=s",
        ),
        (["sweep.objective=-mmcs"], r"sweep\.objective=-mmcs is not measured on text"),
        (["data=synthetic", "data.l0=600"], r"data\.l0=600\.0: .* at most 512"),
        (["data=synthetic", "data.l0=0"], r"data\.l0=0\.0: "),
        (["data=synthetic", "data.dim=0"], r"data\.dim=0: give 1 or more"),
        (["data=synthetic", "data.zipf=-1"], r"data\.zipf=-1\.0: "),
        (["data=synthetic", "data.correlation=1"], r"data\.correlation=1\.0: "),
        (["data=synthetic", "data.hierarchy=1"], r"data\.hierarchy=1\.0: "),
        (["data=synthetic", "data.hierarchy=1e-4"], r"data\.hierarchy=0\.0001: .* one child among"),
        (["data=synthetic", "data.hierarchy=0.5", "data.zipf=0"], r"data\.hierarchy=0\.5: with "),
        (["data=synthetic", "data.concepts=100000"], r"data\.concepts=100000: give at most 8192"),
        (["data=synthetic", "data.seed=-1"], r"data\.seed=-1: "),
        (["data=synthetic", "data.pool=0"], r"data\.pool=0: "),
    ],
)
def test_what_has_no_meaning_without_an_llm_is_refused(overrides, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make(*overrides)


@pytest.mark.parametrize(
    "setting", ["context=64", "max_norm=10", "keep_special=true", "cache=true"]
)
def test_settings_of_text_are_unknown_to_synthetic_data(setting):
    with pytest.raises(ConfigCompositionException):
        make("data=synthetic", f"data.{setting}")


@pytest.mark.slow
def test_a_model_brings_its_own_loss():
    for name, row in ARCHITECTURES.items():
        config = make(f"model={name}")
        assert (type(config.model), type(config.loss)) == (row.config, row.loss)
    assert make("model=relu", "loss=relu") == make()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=dense"],
        ["loss=topk"],
        ["model=dense", "loss=relu"],
        ["model=jumprelu", "loss=gated"],
        ["model=batch_topk", "loss=matryoshka"],
        ["model.name=dense"],
        ["model.name=topk"],
    ],
)
def test_a_loss_of_another_architecture_is_an_error(overrides):
    with pytest.raises(UserError, match=r"^loss: .* model\.name=\w+ but of model=\w+.*; choose"):
        make(*overrides)


def test_an_unknown_architecture_is_an_error_before_anything_is_loaded():
    with pytest.raises(UserError, match=r"^model\.name=topkk: no such architecture; choose from"):
        make("model.name=topkk")


@pytest.mark.slow
def test_only_a_transcoder_has_a_skip_connection():
    assert make("layer=transcoder", "model.skip=true").model.skip
    for autoencoder in ([], ["layer.target=resid"]):
        with pytest.raises(UserError, match=r"^model\.skip=true: an autoencoder's skip .*layer="):
            make("model.skip=true", *autoencoder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss.target_l0=10000"],
            r"^loss\.target_l0=10000.0: there are only model\.features=10000",
        ),
        (["loss.target_l0=50", "loss.warmup=0.6"], r"^loss\.warmup=0\.6: .*give at most 0\.5$"),
    ],
)
def test_a_target_that_cannot_be_reached_is_an_error(overrides, message):
    with pytest.raises(UserError, match=message):
        make(*overrides)


@pytest.mark.slow
def test_a_typo_behind_a_plus_is_an_error():
    for typo in ("+model.featurs=3", "+loss.lambda=1", "+sed=1"):
        with pytest.raises(UserError, match="leave out the"):
            make(typo)


@pytest.mark.slow
def test_the_weights_follow_the_seed_unless_they_are_given_another():
    assert make("seed=7").model.seed == 7
    assert make("model=dense", "seed=7").model.seed == 7
    assert make("seed=7", "model.seed=1").model.seed == 1
    assert make("model.seed=1").seed == 0


@pytest.mark.slow
def test_a_batch_larger_than_the_pool_is_an_error():
    assert make("trainer.batch=500", "data.pool=500").trainer.batch == 500
    with pytest.raises(UserError, match=r"^trainer\.batch=501 is larger .*data\.pool=500"):
        make("trainer.batch=501", "data.pool=500")


@pytest.mark.slow
def test_a_feature_cannot_be_silent_for_longer_than_the_run():
    assert make("callbacks.dead_after=999", "trainer.tokens=1000", "trainer.batch=10")
    with pytest.raises(UserError, match=r"^callbacks\.dead_after=2048: .*trainer\.tokens=2048; "):
        make("callbacks.dead_after=2048", "trainer.tokens=2048")


HEAD_HALF = {
    "model.features": 77,
    "model.seed": 5,
    "loss.l1": 3e-3,
    "loss.target_l0": 50.0,
    "loss.p": 0.2,
    "optim.lr": 3e-4,
    "layer.index": 3,
    "layer.source": Kind.mlp,
    "layer.target": Kind.resid,
    "callbacks.dead_after": 5000,
}
STREAM_HALF = {
    "llm.name": "gpt2",
    "llm.batch": 3,
    "llm.dtype": Dtype.float32,
    "data.context": 64,
    "data.pool": 32768,
    "data.max_norm": 10.0,
    "data.held_out": ["hamlet"],
    "trainer.tokens": 100_000,
    "trainer.batch": 512,
    "eval.tokens": 128,
    "seed": 1,
}


def changed(config: Config, setting: str, value) -> Config:
    """`config` with one setting, given by its dotted name, changed."""
    group, _, key = setting.partition(".")
    return replace(
        config, **{group: replace(getattr(config, group), **{key: value}) if key else value}
    )


def test_the_two_halves_are_the_whole():
    groups = set(Config.__dataclass_fields__) - {"logger", "plugins", "resume", "sweep"}
    tried = {setting.split(".")[0] for setting in [*HEAD_HALF, *STREAM_HALF]}
    assert groups == tried


@pytest.mark.parametrize("setting", HEAD_HALF)
def test_runs_that_differ_in_the_head_half_share_a_stream(setting):
    other = changed(make(), setting, HEAD_HALF[setting])
    assert other != make()
    assert other.stream_key() == make().stream_key()


def test_runs_that_differ_in_the_stream_half_share_none():
    configs = [make(), *(changed(make(), *item) for item in STREAM_HALF.items())]
    keys = {config.stream_key() for config in configs}
    assert len(keys) == len(configs), "each changes the key, each to another"


def test_other_text_is_another_stream_and_another_architecture_is_not():
    assert make("data=tinystories").stream_key() != make().stream_key()
    for name in ARCHITECTURES:
        assert make(f"model={name}").stream_key() == make().stream_key()


def test_where_norms_decide_what_is_dropped_the_layer_is_part_of_the_stream():
    config = changed(make(), "data.max_norm", 10.0)
    for setting, value in HEAD_HALF.items():
        same = changed(config, setting, value).stream_key() == config.stream_key()
        assert same == (not setting.startswith("layer."))


ROUND_TRIPS = {
    "the default": [],
    "a data set of the hub": ["data=tinystories", "data.streaming=false", "data.max_norm=10"],
    "any data set of the hub": ["data=hub", "data.name=a/b", "data.subset=c"],
    "local files": ["data=text", "data.path=my text/*.txt", "data.held_out=0.2"],
    "other plays": ["data.held_out=[macbeth]"],
    "dense": ["model=dense", "model.features=12", "seed=3"],
    "topk": ["model=topk", "model.k=3", "loss.auxk=0.1", "loss.auxk_k=7", "seed=3"],
    "batch_topk": ["model=batch_topk", "model.fixed_norm=false", "model.decoder_norm=0.3"],
    "jumprelu": ["model=jumprelu", "model.bandwidth=0.5", "loss.penalty_kind=step", "loss.l0=0.1"],
    "gated": ["model=gated", "loss.target_l0=50", "loss.preact=3e-6", "loss.warmup=0.1"],
    "matryoshka": ["model=matryoshka", "model.groups=[0.1,0.25]", "model.features=33", "model.k=3"],
    "p-annealing": ["loss.p=0.2", "loss.target_l0=null"],
    "a skip transcoder": ["layer=transcoder", "model=topk", "model.skip=true"],
    "another llm": ["llm=gpt2", "llm.dtype=bfloat16", "llm.attn=eager", "layer=attn"],
    "numbers": ["loss.l1=1e-5", "optim.clip=null", "optim.eps=1e-12", "optim.lr=1"],
    "enums": ["trainer.precision=bf16", "callbacks.normalize.mode=scale"],
    "a quoted comma": ["data=text", "data.path='a,b c=d'"],
    "an interpolation": ["model.seed=${trainer.batch}"],
    "gpu": ["trainer=gpu"],
    "concepts": ["data=synthetic", "data.hierarchy=0.5", "seed=3"],
    "activations": ["data=activations", "data.path=acts", "++data.sites={resid.3:cls,mlp.3:a/b}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_run_folder_gives_back_its_config(tmp_path, overrides):
    this = compose_job(*overrides)
    (tmp_path / CONFIG_FILE).write_text(format_config(this))
    again = read_job(tmp_path)
    assert again.config == this.config
    assert (type(again.config.data), type(again.config.loss)) == (
        type(this.config.data),
        type(this.config.loss),
    )
    assert (again.overrides, again.folder) == (overrides, tmp_path)
    assert again.config.stream_key() == this.config.stream_key()
    assert again.config.list_fixed_settings() == this.config.list_fixed_settings()


@pytest.mark.slow
def test_every_source_and_every_architecture_went_round():
    configs = [make(*overrides) for overrides in ROUND_TRIPS.values()]
    assert {config.data.kind for config in configs} == set(SOURCES)
    assert {config.model.name for config in configs} == set(ARCHITECTURES)


def test_values_arrive_in_their_types():
    config = make("trainer.precision=bf16", "callbacks.normalize.mode=none", "optim.lr=1")
    assert config.trainer.precision is Precision.bf16
    assert config.callbacks.normalize.mode is Normalization.none
    assert (type(config.optim.lr), config.optim.lr) == (float, 1.0)


def test_a_setting_that_was_typed_may_refer_to_another():
    typed = ["loss.l1=0.5", "optim.lr=${loss.l1}"]
    hydra = compose("config", typed, return_hydra_config=True).hydra
    assert read_overrides(hydra) == typed, "as text: there is no loss among Hydra's own settings"
    assert make(*typed).optim.lr == 0.5


def test_a_checkpoint_must_agree_on_everything_but_where_and_how_it_is_looked_at():
    config = make()
    free = make("llm.device=cpu", "llm.attn=eager", "trainer.accelerator=cpu", "eval.every=5000")
    assert config.list_fixed_settings() == free.list_fixed_settings()
    assert config.list_fixed_settings() == replace(config, resume="somewhere").list_fixed_settings()
    for setting, value in (HEAD_HALF | STREAM_HALF).items():
        same = changed(config, setting, value).list_fixed_settings() == config.list_fixed_settings()
        assert same == setting.startswith("eval.")


def test_flat_names_are_those_of_the_command_line():
    flat = make("data.max_norm=10").to_flat_dict()
    assert flat["data.max_norm"] == 10
    assert flat["layer.source"] == "resid"
    assert flat["callbacks.normalize.mode"] == "standardize"
    overrides = [f"{name}={'null' if value is None else value}" for name, value in flat.items()]
    simple = [o for o in overrides if "[" not in o]
    assert make(*simple) == make("data.max_norm=10")


def test_a_run_is_named_by_what_was_asked_for():
    assert compose_job("model.features=5", "loss.l1=1e-2").label == "model.features=5,loss.l1=1e-2"
    assert compose_job().label == "relu"


@pytest.mark.slow
def test_resume_reads_the_run_and_takes_nothing_else(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(format_config(compose_job("model.features=5")))
    resumed = compose_job(f"resume={tmp_path}")
    assert resumed.resumed
    assert (resumed.folder, resumed.config.model.features) == (tmp_path, 5)
    assert resumed.overrides == ["model.features=5"]
    with pytest.raises(UserError, match=r"loss\.l1=1 cannot be given with it"):
        compose_job(f"resume={tmp_path}", "loss.l1=1")


def test_an_objective_that_is_typed_with_resume_is_checked(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(format_config(compose_job()))
    assert compose_job(f"resume={tmp_path}", "sweep.objective=-kl").config.sweep.objective == "-kl"
    with pytest.raises(UserError, match=r"sweep\.objective=nope is not measured on text: choose"):
        compose_job(f"resume={tmp_path}", "sweep.objective=nope")


def test_a_run_folder_is_a_day_and_a_time_or_the_run_that_goes_on(tmp_path):
    assert Path(pick_run_folder(None)).parts[0] == "outputs"
    assert len(Path(pick_run_folder(None)).parts) == 3
    with pytest.raises(UserError, match="holds no run"):
        pick_run_folder(str(tmp_path))
    (tmp_path / CONFIG_FILE).write_text("")
    assert pick_run_folder(str(tmp_path)) == str(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("32", Precision.fp32),
        ("fp32", Precision.fp32),
        ("32-true", Precision.fp32),
        ("bf16", Precision.bf16),
        ("bf16-mixed", Precision.bf16),
    ],
)
def test_a_precision_may_be_named_as_lightning_names_it(typed, taken):
    config = make(f"trainer.precision={typed}")
    assert config.trainer.precision is taken
    assert config.to_flat_dict()["trainer.precision"] == taken.name, (
        "one name for one thing on disk"
    )


def test_a_job_of_a_sweep_is_named_after_what_is_swept():
    assert name_job_folder("loss.l1=0.001", 3) == "loss.l1=0.001"
    assert name_job_folder("data.path=/a/b", 3) == "data.path=_a_b"
    assert name_job_folder("", 3) == "3"
    long = name_job_folder("\u00e9" * 300, 3)
    assert len(long.encode()) <= 200 and long.endswith("_3")


@pytest.mark.slow
def test_local_paths_are_saved_absolute(tmp_path, monkeypatch):
    (tmp_path / "llm").mkdir()
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, kept in {
        "a.txt": tmp_path / "a.txt",
        f"../{tmp_path.name}/*.txt": tmp_path / "*.txt",
        "missing.txt": "missing.txt",
    }.items():
        overrides = ["llm=hf", "llm.name=llm", "layer.index=0", "data=text", f"data.path={given}"]
        config = compose_job(*overrides).config
        assert (config.llm.name, config.data.path) == (str(tmp_path / "llm"), str(kept))
    assert compose_job("llm=gpt2").config.llm.name == "openai-community/gpt2"
    assert compose_job("llm=smollm2", "seed=9").config.llm.name == "smollm2", "the packaged one"


def test_the_smoke_run_does_everything_once():
    config = make("trainer=smoke")
    assert config.eval.every < config.trainer.tokens
    assert config.trainer.checkpoint_every < config.trainer.tokens
    assert config.data.pool < config.trainer.tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("model: [", "cannot be read"),
        ("{}", "cannot be read"),
        ("data: {kind: stone}\nmodel: {name: relu}\n", "stone"),
    ],
)
def test_a_damaged_config_says_so_in_one_line(tmp_path, text, message):
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_job(tmp_path)
    assert "\n" not in str(error.value)


def test_a_config_of_another_version_names_what_it_does_not_know(tmp_path):
    text = format_config(compose_job()).replace("  features:", "  old_name:")
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml cannot be read: .*old_name"):
        read_job(tmp_path)


# later versions save the kind
OF_0_1_0 = [overrides for overrides in ROUND_TRIPS.values() if "data=activations" not in overrides]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", OF_0_1_0)
def test_a_run_that_does_not_say_its_kind_of_data_is_read(tmp_path, overrides):
    saved = format_config(compose_job(*overrides)).splitlines()
    without = [line for line in saved if not line.startswith("  kind: ")]
    assert len(without) == len(saved) - 1
    (tmp_path / CONFIG_FILE).write_text("\n".join(without))
    config = read_job(tmp_path).config
    assert config == make(*overrides)
    assert "data.kind" not in config.list_fixed_settings(), "its checkpoint does not say it either"


@pytest.mark.parametrize("kind", ["hub", "paper"])
def test_a_kind_with_the_settings_of_another_is_refused(kind):
    with pytest.raises(UserError, match=rf"^data\.kind={kind}: .* choose data=\.\.\."):
        make(f"data.kind={kind}")


def test_a_run_of_a_version_with_fewer_settings_is_read(tmp_path):
    saved = format_config(compose_job("data=text", "data.path=x"))
    fewer = [line for line in saved.splitlines() if "cache" not in line]
    assert len(fewer) == len(saved.splitlines()) - 2
    (tmp_path / CONFIG_FILE).write_text("\n".join(fewer))
    assert read_job(tmp_path).config == make("data=text", "data.path=x")


@pytest.mark.slow
def test_an_experiment_beats_config_yaml(tmp_path):
    """`_self_` comes before `experiment`: what config.yaml itself sets must not win."""
    text = (CONF / "config.yaml").read_text()
    assert text.index("- _self_") < text.index("- experiment:")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "tried.yaml").write_text(
        "# @package _global_\nseed: 5\nloss:\n  l1: 0.5\noptim:\n  lr: 0.25\nhydra:\n"
        "  job:\n    name: tried\n"
    )
    overrides = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=tried", "optim.lr=0.125"]
    composed = compose("config", overrides, return_hydra_config=True)
    assert composed.hydra.job.name == "tried", "config.yaml says train"
    config = make_job(compose("config", overrides), Path("folder"), []).config
    assert (config.seed, config.loss.l1) == (5, 0.5)
    assert config.optim.lr == 0.125, "and the command line beats the experiment"


def test_the_llms_loss_can_be_left_out_but_its_tokens_are_not_negative():
    assert EvalConfig(loss_tokens=0).loss_tokens == 0
    with pytest.raises(UserError, match=r"^eval\.loss_tokens=-1: .* or 0 to measure no loss"):
        EvalConfig(loss_tokens=-1)

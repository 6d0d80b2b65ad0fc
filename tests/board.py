"""TensorBoard's own HTTP answers, without a server."""

from pathlib import Path

from werkzeug.test import Client


def opened(folder: Path) -> Client:
    """TensorBoard on a folder of runs. Of what it brings with it, html5lib warns."""
    from tensorboard import default, program
    from tensorboard.backend.application import TensorBoardWSGIApp

    board = program.TensorBoard(plugins=default.get_plugins())
    flags = "--load_fast=false", "--reload_interval=0", "--reload_task=blocking"
    board.configure(argv=["tensorboard", "--logdir", str(folder), *flags])
    data = board._make_data_ingester()
    data.start()
    app = TensorBoardWSGIApp(
        board.flags,
        board.plugin_loaders,
        data.data_provider,
        board.assets_zip_provider,
        data.deprecated_multiplexer,
        None,
    )
    return Client(app)


def columns(board: Client) -> list[str]:
    """The settings of the HParams tab in its order, those that it takes for swept with a star."""
    infos = board.post("/data/plugin/hparams/experiment", json={}).json["hparamInfos"]
    return [info["name"] + "*" * info.get("differs", False) for info in infos]


def runs(board: Client) -> dict[str, dict]:
    """The settings that the HParams tab shows of each run."""
    shown = [{"hparam": name.rstrip("*"), "includeInResult": True} for name in columns(board)]
    ends = ["STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_SUCCESS"]
    asked = {"allowedStatuses": ends, "colParams": shown, "sliceSize": 100}
    groups = board.post("/data/plugin/hparams/session_groups", json=asked).json["sessionGroups"]
    return {group["name"]: group["hparams"] for group in groups}

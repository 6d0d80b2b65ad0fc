"""TensorBoard's HTTP responses, read without starting a server."""

from pathlib import Path

from werkzeug.test import Client


def open_board(folder: Path) -> Client:
    """Open TensorBoard on a folder of runs; callers ignore the warnings of its html5lib."""
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


def list_hparams(board: Client) -> list[str]:
    """Settings in the order of the HParams tab; a star marks those that it regards as swept."""
    infos = board.post("/data/plugin/hparams/experiment", json={}).json["hparamInfos"]
    return [info["name"] + "*" * info.get("differs", False) for info in infos]


def read_runs(board: Client) -> dict[str, dict]:
    """Run -> settings that the HParams tab shows of it."""
    shown = [{"hparam": name.rstrip("*"), "includeInResult": True} for name in list_hparams(board)]
    ends = ["STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_SUCCESS"]
    query = {"allowedStatuses": ends, "colParams": shown, "sliceSize": 100}
    groups = board.post("/data/plugin/hparams/session_groups", json=query).json["sessionGroups"]
    return {group["name"]: group["hparams"] for group in groups}

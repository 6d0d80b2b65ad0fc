"""Separate environments for tools whose packages cannot be installed beside ours."""

import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import torch
from timing.child import Failed


def make_environment(cache: Path, packages: tuple[str, ...], log: Path) -> str:
    """Make an environment with `packages` (arguments of pip install) in a folder of `cache`, unless
    it exists; returns its interpreter."""
    folder = cache / re.split("[= ]", packages[-1])[0]
    python, done = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(packages)
    if done.is_file() and done.read_text("utf8") == wanted:
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # our packages are visible in it, and those that fit are not installed again
    (site / "ours.pth").write_text(sysconfig.get_path("purelib"), "utf8")
    constraint = folder / "torch.txt"
    constraint.write_text(f"torch=={torch.__version__.partition('+')[0]}", "utf8")
    _pip(python, log, "install", "-c", str(constraint), *packages)
    # those of PyPI are built for torch with CUDA, and transformers would import them
    _pip(python, log, "uninstall", "-y", "torchvision", "torchaudio")
    done.write_text(wanted, "utf8")
    return str(python)


def _pip(python: Path, log: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    log.mkdir(exist_ok=True)
    (log / f"{arguments[0]}.log").write_text(done.stdout + done.stderr, "utf8")
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["pip failed"])[-1])

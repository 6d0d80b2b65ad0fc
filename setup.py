"""Adds to the wheel what pyproject.toml cannot express: conf/ as the folder sae_lightning/conf."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["sae_lightning*", "hydra_plugins"]),
        "sae_lightning.conf",
    ],
    package_dir={"sae_lightning.conf": "conf"},
)

"""The part of the build that TOML cannot say; all else is in `pyproject.toml`.

The kernels lie in `kernels/` at the top of the repository and are imported as
`encoder_fast.kernels` through the symlink `encoder_fast/kernels`. The folder has no
`__init__.py`: as a package it would hide the distribution `kernels`, which transformers imports.
setuptools finds no package without `__init__.py`, so this one is named here.
"""

from pathlib import Path

from setuptools import find_packages, setup

if not Path("encoder_fast/kernels").is_dir():
    raise SystemExit(
        "encoder_fast/kernels is not a folder. It is a symlink to kernels/; clone with "
        "`git -c core.symlinks=true clone`, on a file system that has symlinks."
    )

setup(
    packages=[*find_packages(include=["encoder_fast", "encoder_fast.*"]), "encoder_fast.kernels"],
    package_data={"": ["*.json", "*.jsonl", "*.txt"]},
    include_package_data=False,
)

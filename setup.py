"""What a wheel holds beside the package's files: the recipes and claims of the repository, as `pretrain/shipped`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    """Copies them into what a wheel is made of; an editable installation finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in ("recipes", "claims"):
            packed = Path(self.build_lib) / "pretrain" / "shipped" / name
            shutil.rmtree(packed, ignore_errors=True)
            shutil.copytree(name, packed)


setup(cmdclass={"build_py": Build})

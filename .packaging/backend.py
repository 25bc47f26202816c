"""setuptools, which here finds the packages instead of being given their names: src, and kernels as densegrad.kernels.

`find` of setuptools keeps the name that a folder has, and a package named `kernels` must not be installed. The shape of
this file is that of setuptools' own documentation: "Dynamic build dependencies and other build_meta tweaks".
"""
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from setuptools import find_packages, setup
from setuptools.build_meta import _BuildMetaBackend
from wheel.wheelfile import WheelFile

SOURCE = Path(__file__).parents[1] / "src"


class _Backend(_BuildMetaBackend):
    def run_setup(self, setup_script: str = "setup.py") -> None:
        device_code = find_packages(".", include=["kernels", "kernels.*"])
        setup(packages=find_packages("src") + [f"densegrad.{name}" for name in device_code],
              package_dir={"": "src", "densegrad.kernels": "kernels"})

    def build_editable(self, wheel_directory: str, *options: object) -> str:
        """setuptools' editable wheel, with a line more for site-packages: the path of src.

        Python finds the two folders by an import hook of setuptools', which no type checker or editor can follow; they
        follow paths. A path is enough for them, since what users write never names a kernel. A link to the kernels in
        src would be a text file where git on Windows checks it out, and setuptools' tree of links, its strict mode,
        would not have files that are added later.
        """
        name = super().build_editable(wheel_directory, *options)
        with TemporaryDirectory() as folder:
            with ZipFile(Path(wheel_directory, name)) as wheel:
                wheel.extractall(folder)
            Path(folder, "__editable__.densegrad.source.pth").write_text(f"{SOURCE}\n", encoding="utf-8")
            with WheelFile(Path(wheel_directory, name), "w") as wheel:
                wheel.write_files(folder)
        return name


_backend = _Backend()
build_sdist = _backend.build_sdist
build_wheel = _backend.build_wheel
build_editable = _backend.build_editable
get_requires_for_build_sdist = _backend.get_requires_for_build_sdist
get_requires_for_build_wheel = _backend.get_requires_for_build_wheel
get_requires_for_build_editable = _backend.get_requires_for_build_editable
prepare_metadata_for_build_wheel = _backend.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _backend.prepare_metadata_for_build_editable

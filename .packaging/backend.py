"""setuptools, which here finds the packages instead of being given their names: src, and kernels as densegrad.kernels.

`find` of setuptools keeps the name that a folder has, and a package named `kernels` must not be installed. The shape of
this file is that of setuptools' own documentation: "Dynamic build dependencies and other build_meta tweaks".
"""
from setuptools import find_packages, setup
from setuptools.build_meta import _BuildMetaBackend


class _Backend(_BuildMetaBackend):
    def run_setup(self, setup_script: str = "setup.py") -> None:
        device_code = find_packages(".", include=["kernels", "kernels.*"])
        setup(packages=find_packages("src") + [f"densegrad.{name}" for name in device_code],
              package_dir={"": "src", "densegrad.kernels": "kernels"})


_backend = _Backend()
build_sdist = _backend.build_sdist
build_wheel = _backend.build_wheel
build_editable = _backend.build_editable
get_requires_for_build_sdist = _backend.get_requires_for_build_sdist
get_requires_for_build_wheel = _backend.get_requires_for_build_wheel
get_requires_for_build_editable = _backend.get_requires_for_build_editable
prepare_metadata_for_build_wheel = _backend.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _backend.prepare_metadata_for_build_editable

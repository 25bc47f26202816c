"""What type checkers know of the package as it was installed. Left out where mypy or pyright is not.

What users write, and what a checker must say of it, is in `typed_calls.py` and, with PyTorch, `typed_torch_calls.py`.
"""
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("mypy")
pytest.importorskip("pyright")

HERE = Path(__file__).parent
MYPY = ("mypy", "--strict", "--config-file=")
PYRIGHT = ("pyright", "--pythonpath", sys.executable)
#: mypy takes a minute to read PyTorch, pyright a few seconds
CALLS = [(MYPY, "typed_calls.py"), (PYRIGHT, "typed_calls.py"),
         *[(PYRIGHT, "typed_torch_calls.py")] * (find_spec("torch") is not None)]


@pytest.mark.parametrize(("checker", "file"), CALLS, ids=[f"{checker[0]}-{file}" for checker, file in CALLS])
def test_a_checker_knows_what_users_write(checker, file, tmp_path):
    """Away from this repository, so that it finds what is installed; a mistake that it does not see is an error too."""
    shutil.copy(HERE / file, tmp_path)
    found = subprocess.run([sys.executable, "-m", *checker, file], cwd=tmp_path, capture_output=True, text=True,
                           timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr

"""What commands write: whole or not at all, through links, into pipes and devices, and over files only by force."""
import contextlib
import io
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from densegrad.commands import cli, explain
from densegrad.commands.files import written

OLD, NEW = b"precious", b"what is written now"
NOBODY = 65534


def write(path, content=NEW, **options):
    with written(path, **options) as file:
        file.write(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def open_folder():
    """A folder that users without rights may enter, and the rights of such a user: permissions say nothing to root."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_new_file_has_the_usual_permissions(tmp_path):
    mask = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(mask)
    assert (tmp_path / "new").read_bytes() == NEW
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert names(tmp_path) == ["new"]


def test_a_file_is_replaced_by_force_and_keeps_its_permissions(old):
    old.chmod(0o604)
    with pytest.raises(ValueError, match=r"old exists \(--force overwrites it\)"):
        write(old)
    assert old.read_bytes() == OLD
    write(old, force=True)
    assert old.read_bytes() == NEW
    assert stat.S_IMODE(old.stat().st_mode) == 0o604
    assert names(old.parent) == ["old"]


def test_a_secret_is_never_readable_on_the_way(old):
    old.chmod(0o600)
    with written(old, force=True):
        (part,) = set(old.parent.iterdir()) - {old}
        assert stat.S_IMODE(part.stat().st_mode) == 0o600


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    def slowly():
        with written(tmp_path / "new") as file:
            file.write(NEW)
            (tmp_path / "new").write_bytes(OLD)

    with pytest.raises(ValueError, match="exists by now"):
        slowly()
    assert (tmp_path / "new").read_bytes() == OLD
    assert names(tmp_path) == ["new"]


def test_links_stay_links(old, tmp_path):
    link = tmp_path / "folder" / "link"
    link.parent.mkdir()
    link.symlink_to("../old")
    with pytest.raises(ValueError, match="exists"):
        write(link)
    write(link, force=True)
    assert link.is_symlink()
    assert old.read_bytes() == NEW
    assert not old.is_symlink()
    assert names(link.parent) == ["link"]


def test_what_a_link_points_to_is_made(tmp_path):
    (tmp_path / "link").symlink_to("new")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").read_bytes() == NEW


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "link", force=True)


@pytest.fixture
def pipe(tmp_path):
    """A pipe, and what was read from it."""
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    reader.start()

    def content():
        reader.join(timeout=60)
        assert stat.S_ISFIFO(path.stat().st_mode)
        return read[0]

    return path, content


def test_a_pipe_is_written_into(pipe):
    path, content = pipe
    write(path)
    assert content() == NEW
    assert names(path.parent) == ["pipe"]


@pytest.mark.parametrize("force", [False, True])
def test_a_device_is_written_into(force):
    main, side = os.openpty()  # a device of one's own
    try:
        path = Path(os.ttyname(side))
        before = os.stat(path)
        write(path, force=force)
        assert os.read(main, 100) == NEW
        assert os.path.samestat(before, os.stat(path))
        assert stat.S_ISCHR(os.stat(path).st_mode)
    finally:
        os.close(main)
        os.close(side)


@pytest.mark.parametrize(("place", "words"), [
    (".", "is a folder"),
    ("no/new", "there is no folder"),
    ("old/new", "Not a directory"),
    ("n" * 300, "File name too long"),
])
def test_what_cannot_be_is_refused_before_anything_is_computed(old, place, words):
    with pytest.raises((ValueError, OSError), match=words), written(old.parent / place, force=True):
        pytest.fail("the block was entered")
    assert names(old.parent) == ["old"]


def test_a_folder_without_permission_is_refused_before_anything_is_computed(open_folder):
    (open_folder / "old").write_bytes(OLD)
    open_folder.chmod(0o555)
    for name in ("new", "old"):
        with pytest.raises(PermissionError) as refused, written(open_folder / name, force=True):
            pytest.fail("the block was entered")
        assert refused.value.filename == str(open_folder / name)
        assert f"a new file in the folder {open_folder}" in refused.value.strerror
    assert (open_folder / "old").read_bytes() == OLD


def test_a_file_without_permission_is_refused_before_anything_is_computed(open_folder):
    old = open_folder / "old"
    old.write_bytes(OLD)
    old.chmod(0o444)
    with pytest.raises(PermissionError), written(old, force=True):
        pytest.fail("the block was entered")
    assert old.read_bytes() == OLD
    assert names(open_folder) == ["old"]


@contextlib.contextmanager
def small_files():
    """No file may grow beyond 1,000 bytes: the system refuses as it does where the disk is full.

    Not as a fixture: pytest's own words may go to a file, too.
    """
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_old_file(old):
    with pytest.raises(OSError, match="File too large") as refused, small_files():
        write(old, NEW * 1000, force=True)
    assert refused.value.filename == str(old)
    assert old.read_bytes() == OLD
    assert names(old.parent) == ["old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interruption_leaves_the_old_file(old, error):
    def half():
        with written(old, force=True) as file:
            file.write(NEW)
            file.flush()
            raise error

    with pytest.raises(error):
        half()
    assert old.read_bytes() == OLD
    assert names(old.parent) == ["old"]


# Every command that writes.


@pytest.fixture(params=["grads --out", "explain --svg", "ptx --output"])
def command(request, tmp_path, monkeypatch):
    """Run a command that writes to a path; what it would compute is replaced where another test looks at it."""
    for name, shape in (("x", (6, 3)), ("dz", (6, 5))):
        np.save(tmp_path / f"{name}.npy", np.ones(shape, np.float32))
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", os.environ.get("NUMBA_ENABLE_CUDASIM", "0"))
    monkeypatch.setattr(cli, "_missing_libraries", list)
    monkeypatch.setattr(cli, "_compiled", lambda *_: computed("a kernel"))
    monkeypatch.setattr("densegrad.catalogue.kernel_variants", lambda: {"kernel": SimpleNamespace(kernel="another")})
    work_out, gradients = explain.work_out, cli._gradients
    monkeypatch.setattr(explain, "work_out", lambda *sizes: computed(work_out(*sizes)))
    monkeypatch.setattr(cli, "_gradients", lambda *given: computed(gradients(*given)))
    state = {"runs": 0, "error": None}

    def computed(result):
        state["runs"] += 1
        if state["error"]:
            raise state["error"]
        return result

    words = {"grads": ["--x", tmp_path / "x.npy", "--dz", tmp_path / "dz.npy", "--out"],
             "explain": ["--svg"], "ptx": ["kernel", "--output"]}
    name = request.param.split()[0]

    def run(path, *options, error=None):
        state.update(runs=0, error=error)
        result = CliRunner().invoke(cli.app, [str(word) for word in (name, *words[name], path, *options)])
        return result, state["runs"]

    return run


def test_every_command_overwrites_only_by_force_and_asks_first(command, old):
    result, runs = command(old)
    assert (result.exit_code, runs) == (1, 0)
    assert "exists (--force overwrites it)" in " ".join(result.stderr.split())
    assert old.read_bytes() == OLD
    result, runs = command(old, "--force")
    assert (result.exit_code, runs) == (0, 1), result.output
    assert old.read_bytes() != OLD


def test_every_command_looks_for_the_folder_first(command, tmp_path):
    result, runs = command(tmp_path / "no" / "new")
    assert (result.exit_code, runs) == (1, 0)
    assert "there is no folder" in " ".join(result.stderr.split())


def test_every_command_writes_through_links_and_into_pipes(command, old, pipe):
    path, content = pipe
    link = old.with_name("link")
    link.symlink_to(old)
    assert command(link, "--force")[0].exit_code == 0
    assert link.is_symlink()
    assert command(path)[0].exit_code == 0
    if old.read_bytes().startswith(b"PK"):  # zip archives hold the time of their making
        with np.load(io.BytesIO(content())) as piped, np.load(old) as kept:
            assert {name: array.tobytes() for name, array in piped.items()} == {
                name: array.tobytes() for name, array in kept.items()}
    else:
        assert content() == old.read_bytes()


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), cli.INTERRUPTED), (RuntimeError("no luck"), 1)])
def test_every_command_that_is_interrupted_leaves_the_old_file(command, old, error, status):
    before = names(old.parent)
    result, runs = command(old, "--force", error=error)
    assert (result.exit_code, runs) == (status, 1)
    assert "Traceback" not in result.output
    assert old.read_bytes() == OLD
    assert names(old.parent) == before


def test_an_archive_goes_into_a_device_and_behind_what_standard_output_has(tmp_path):
    for name in ("x", "dz"):
        np.save(tmp_path / f"{name}.npy", np.ones((2, 3), "float32"))
    command = [sys.executable, "-m", "densegrad", "grads", "--x", "x.npy", "--dz", "dz.npy", "--out"]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    subprocess.run([*command, "/dev/null"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    (tmp_path / "appended").write_bytes(OLD)
    with (tmp_path / "appended").open("ab") as output:
        subprocess.run([*command, "/dev/stdout"], cwd=tmp_path, env=environment, check=True, stdout=output)
    content = (tmp_path / "appended").read_bytes()
    assert content.startswith(OLD)
    with np.load(io.BytesIO(content[len(OLD):])) as archive:
        np.testing.assert_array_equal(archive["db"], [2, 2, 2])


def test_a_command_that_is_asked_to_end_leaves_nothing_half_written(old):
    script = ("import os, signal, sys; from pathlib import Path; from densegrad.commands import cli, files\n"
              "def app():\n"
              "    with files.written(Path(sys.argv[1]), force=True):\n"
              "        os.kill(os.getpid(), signal.SIGTERM)\n"
              "cli.app = app; cli.main()")
    ended = subprocess.run([sys.executable, "-c", script, str(old)])
    assert ended.returncode == 128 + signal.SIGTERM
    assert old.read_bytes() == OLD
    assert names(old.parent) == ["old"]


@pytest.mark.parametrize("kernel", [[], ["matmul_simt"]])
def test_a_list_of_kernels_is_not_what_output_is_for(kernel, tmp_path):
    path = tmp_path / "kernel.ptx"
    found = CliRunner().invoke(cli.app, ["ptx", *kernel, "-o", str(path)])
    assert found.exit_code == 1
    assert "--output takes one variant's PTX" in found.output
    assert not path.exists()

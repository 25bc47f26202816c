"""What the package says of itself in several places is the same in all of them."""
import re
from importlib import metadata
from pathlib import Path

import pytest

import densegrad

ROOT = Path(__file__).parents[1]
INSTALLED = metadata.metadata("densegrad")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "pattern"), [
    ("CITATION.cff", r"(?m)^version: (\S+)$"),
    ("CHANGELOG.md", r"(?m)^## ([^\s,]+)"),
])
def test_the_version_is_the_same_everywhere(name, pattern):
    assert re.search(pattern, read(name)).group(1) == densegrad.__version__ == INSTALLED["Version"]


def test_the_pythons_that_are_named_are_those_that_are_tested():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(INSTALLED.get_all("Classifier")))
    assert named
    assert named == re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", read(".github/workflows/checks.yml"))[1])
    assert INSTALLED["Requires-Python"] == f">={named[0]}"


def test_every_address_of_the_project_is_in_its_metadata():
    """So that one who moves the project finds them all: whoever changes the home page changes the others too."""
    urls = dict(line.split(", ", 1) for line in INSTALLED.get_all("Project-URL"))
    home = urls["Homepage"]
    owner = home.removeprefix("https://github.com/")
    assert all(url.startswith(home) for url in urls.values())
    for name in ("README.md", "CITATION.cff", "CHANGELOG.md"):
        for host, place in re.findall(r"https://(github\.com|raw\.githubusercontent\.com)/([\w-]+/[\w-]+)", read(name)):
            assert place == owner, (name, host)


def test_the_readme_is_read_in_ten_minutes():
    assert len(read("README.md").splitlines()) <= 150
    assert len(read("README.md").split()) <= 1200

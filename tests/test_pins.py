"""The lowest versions that are tested are the bounds that pyproject.toml states."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent.parent


def test_the_bounds_are_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    bounds = dict(requirement.split(">=") for requirement in stated)
    pins = re.findall(r"^([a-z]+)==([\d.]+)", (ROOT / "tests/pins/lowest.txt").read_text(encoding="utf-8"), re.M)
    lowest = dict(reversed(pins))  # of several versions of one package the first, which is the lowest
    assert lowest.keys() == bounds.keys()
    assert all(f"{lowest[name]}.".startswith(f"{bound}.") for name, bound in bounds.items())


def test_the_groups_are_the_extras():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, groups = settings["project"]["optional-dependencies"], settings["dependency-groups"]
    assert groups["test"] == extras["test"]
    assert groups["dev"] == [{"include-group": "test"}, *extras["dev"]]

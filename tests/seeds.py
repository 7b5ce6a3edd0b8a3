"""Every property of the default suite with many seeds: `python -m tests.seeds 200 --log seeds.jsonl`.

Each seed is a pytest of its own, and examples are not stored, so that no seed knows what another has found. One line per
seed goes to the log; a run that was broken off goes on after the last of them. A log belongs to one version of the code.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Tried(NamedTuple):
    """What came of one seed."""

    seed: int
    properties: int  # how many were tried
    seconds: float
    failed: dict[str, str]  # the test -> what it said at the end


def selection() -> str:
    """The properties among what `pytest` runs by default."""
    default = re.search(r"-m '(.+?)'", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert default, "pyproject.toml selects no tests by default"
    return f"hypothesis and ({default[1]})"


def tried(seed: int, more: list[str]) -> Tried:
    """Run every property with this seed."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = pathlib.Path(scratch, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", selection(), f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, f"--hypothesis-seed={seed}", *more]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
        if ran.returncode not in (0, 1):  # no test has failed, and yet it has not gone well
            sys.exit(f"{ran.stdout}{ran.stderr}pytest ended with exit code {ran.returncode}")
        cases = list(xml.parse(report).iter("testcase"))
    failed = {}
    for case in cases:
        for problem in [*case.iter("failure"), *case.iter("error")]:
            failed[f"{case.get('classname')}::{case.get('name')}"] = (problem.text or "")[-4000:]
    return Tried(seed, len(cases), round(time.monotonic() - begun, 1), failed)


def line(one: Tried) -> str:
    words = "".join(f"\n  --hypothesis-seed={one.seed} fails {test}" for test in one.failed)
    return f"seed {one.seed}: {one.properties} properties, {len(one.failed)} failed, {one.seconds:.0f} s{words}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seeds", type=int, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--log", type=pathlib.Path, help="what is known already, and gains a line per seed")
    chosen, more = parser.parse_known_args(arguments)  # all else is pytest's, such as a file of tests
    known = chosen.log.read_text(encoding="utf-8").splitlines() if chosen.log and chosen.log.exists() else []
    outcomes = {one.seed: one for one in (Tried(**json.loads(text)) for text in known)}
    wanted = range(chosen.first, chosen.first + chosen.seeds)
    for seed in wanted:
        if seed not in outcomes:
            outcomes[seed] = tried(seed, more)
            if chosen.log:
                with chosen.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(outcomes[seed]._asdict()) + "\n")
        print(line(outcomes[seed]), flush=True)
    failed = [one.seed for one in outcomes.values() if one.failed and one.seed in wanted]
    seconds = sum(outcomes[seed].seconds for seed in wanted)
    print(f"{len(wanted)} seeds in {seconds:.0f} s; {len(failed)} with failures{': ' if failed else ''}{failed or ''}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

"""Check the exercises that a file solves: python docs/exercises mine.py"""

import argparse
import pathlib
import runpy
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

from exercises import NAMES, verdict  # noqa: E402


def main() -> int:
    options = argparse.ArgumentParser(prog="python docs/exercises", description=__doc__)
    options.add_argument("file", metavar="FILE", help="a Python file with functions that have the names of exercises")
    chosen = options.parse_args()
    if not pathlib.Path(chosen.file).is_file():
        options.error(f"there is no file {chosen.file}")
    functions = runpy.run_path(chosen.file)
    found = [name for name in NAMES if callable(functions.get(name))]
    if not found:
        options.error(f"{chosen.file} solves no exercise; there are {', '.join(NAMES)}")
    verdicts = {name: verdict(functions[name], name) for name in found}
    for name, (is_right, sentence) in verdicts.items():
        print(f"{name}: {'right' if is_right else 'not yet'}: {sentence}.")
    return 0 if all(is_right for is_right, _ in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

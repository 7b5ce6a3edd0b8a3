"""Draw horizon.svg, what each patch of scene.png is still worth at every layer of minivtw-tiny: python docs/pictures/horizon.py"""

import pathlib

from drawing import options, standalone

import minivtw
from minivtw.methods.text import withdrawal_layer
from minivtw.page.horizon import horizon
from minivtw.page.watching import ask, see

HERE, QUESTION = pathlib.Path(__file__).parent, "Describe the image."


def main() -> None:
    options(__doc__).parse_args()
    vlm = minivtw.load()
    question = ask(vlm, see(vlm, HERE / "scene.png"), QUESTION)
    drawing = horizon(vlm, question, withdrawal_layer(vlm.method()))
    (HERE / "horizon.svg").write_text(standalone(drawing, f"What each patch is worth: {QUESTION}"), encoding="utf-8")


if __name__ == "__main__":
    main()

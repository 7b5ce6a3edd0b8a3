"""What runs in the page's worker: its requests are answered as the server of `minivtw.explore` answers them.

The package is used as it is. Two packages that it needs have no WebAssembly build; docs/from_scratch/ has what stands in for them.
"""

import inspect
import json
import pathlib
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
MINE = "mine.py"
SCORED = ("image", "family", "question", "answer")  # what a sample needs to be scored


def begin() -> Callable[[str, Any], str]:
    """Load the embedded model. Returns what answers a request, (name, body) -> the status and the answer as JSON.

    body: a Uint8Array.
    """
    from docs.from_scratch import bpe, tensors

    sys.modules.update({"tokenizers": bpe, "safetensors": tensors, "safetensors.numpy": tensors})
    tensors.numpy = tensors  # type: ignore[attr-defined]

    import minivtw
    from minivtw import explore
    from minivtw.checkpoints.hub import embedded_folder
    from minivtw.inputs.questions import read_questions
    from minivtw.inputs.scoring import score
    from minivtw.methods.text import Method
    from minivtw.page.exploring import Explorer

    class Here(Explorer):
        """The live page in the reader's own browser, where a method that they wrote may run."""

        begun: str | None = None  # the method that the page begins with

        def sample(self, image: str, question: str, answer: str) -> dict[str, str]:
            """Without the thumbnail: the page has the recorded ones, and drawing 21 of them takes half a second here."""
            name = self.hold(pathlib.Path(image).read_bytes())
            return {"picture": name, "question": question, "answer": answer}

        def requested_method(self, content: dict) -> Method | None:
            spec = str(content.get("method"))
            self.own = spec if spec.startswith(f"{MINE}:") else self.begun
            return super().requested_method(content)

        def mine(self, content: dict) -> dict:
            """The cell's text, kept as a file; returns how to write the method, with K if it takes a layer."""
            pathlib.Path(MINE).write_text(content["text"], encoding="utf-8")
            try:
                takes = inspect.signature(runpy.run_path(MINE)["my_method"]).parameters
            except Exception as error:
                return {"error": said(error)}
            return {"template": f"{MINE}:my_method" + (",layer=K" if "layer" in takes else "")}

        def scored(self, content: dict) -> dict:
            """One of the shipped samples under a method: the points that its answer gets, from 0 to 1."""
            question = samples[content["sample"]]
            name = self.samples[content["sample"] + 1]["picture"]  # the first is the page's own
            content = content | {"picture": name, "question": question.question}
            frame, alone = self.frame(content), self.question(content).answer.text
            points, without = (score(question.family, text, question.answer) for text in (frame["answer"], alone))
            return frame | {"points": points, "alone": without, "right": question.answer}

    vlm, samples = minivtw.load(), read_questions(embedded_folder() / "samples", SCORED)
    here = Here(vlm, vlm.method("auto"), str(ROOT / "docs" / "pictures" / "scene.png"))
    here.begun = here.own
    explore.REQUESTS = (*explore.REQUESTS, "mine", "scored")  # type: ignore[assignment]

    def answer(name: str, body: Any) -> str:
        status, content = explore.answered(here, name, body.to_bytes())
        return f"{status} {json.dumps(content)}"

    return answer


def said(error: Exception) -> str:
    """What is wrong with the cell's text, and in which line."""
    if isinstance(error, KeyError) and error.args == ("my_method",):
        return "there is no function my_method"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == MINE]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    what = error.msg if isinstance(error, SyntaxError) else error
    return f"line {line}: {type(error).__name__}: {what}"

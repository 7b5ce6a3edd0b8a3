"""Draw accuracy.svg of chapter 6 from docs/data/withdrawn-by-layer.json: python docs/pictures/accuracy.py [EMBEDDED.json]

With a file that `python -m minivtw.evaluate questions --withdraw off,0,1,…,12 --json EMBEDDED.json` wrote, its figures
take the place of the stored ones first.
"""

import json
import pathlib

from drawing import options, standalone

from minivtw.page.charts import line_chart

HERE = pathlib.Path(__file__).parent
DATA = HERE.parent / "data" / "withdrawn-by-layer.json"


def kept(content):
    """What the chapter needs of an evaluation: a row for each K, the last without withdrawal."""
    alone = [run for run in content["runs"] if "+" not in (run["method"] or "")]  # withdrawal and nothing else
    runs = sorted(alone, key=lambda run: 99 if run["withdraw_layer"] is None else run["withdraw_layer"])
    rows = [
        {
            "withdraw_layer": run["withdraw_layer"],
            "accuracy": {family: round(value, 4) for family, value in run["accuracy"].items()},
            "mean": round(run["mean"], 4),
            "agreement": round(run["agreement"], 4),
            "saved": round(1 - run["prefill_flops"] / run["prefill_flops_without_withdrawal"], 4),
        }
        for run in runs
    ]
    return {"questions": content["questions"], "runs": rows}


def main():
    parser = options(__doc__)
    parser.add_argument("embedded", nargs="?", metavar="EMBEDDED.json", type=pathlib.Path)
    measured, data = parser.parse_args().embedded, json.loads(DATA.read_text(encoding="utf-8"))
    if measured:
        data["embedded"] |= kept(json.loads(measured.read_text(encoding="utf-8")))
        DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    embedded, plain = (
        [run for run in data[name]["runs"] if run["withdraw_layer"] is not None] for name in ("embedded", "plain")
    )
    drawing = line_chart(
        [run["withdraw_layer"] for run in embedded],
        [
            ("embedded", "visual", [run["mean"] for run in embedded]),
            ("plain", "sink", [run["mean"] for run in plain]),
            ("prefill left", "other dashed", [1 - run["saved"] for run in embedded]),
        ],
        ("layer K before which the image leaves", "right answers"),
    )
    (HERE / "accuracy.svg").write_text(
        standalone(drawing, "Right answers if the image leaves before layer K"), encoding="utf-8"
    )


if __name__ == "__main__":
    main()

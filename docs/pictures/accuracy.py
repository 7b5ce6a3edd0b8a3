"""The picture and the tables of chapter 8, from what `minivtw.evaluate --json` wrote (needs the extra `figures`).

    python docs/pictures/accuracy.py plain.json embedded.json
"""

import json
import pathlib
import sys

import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
TITLES = ("plain: trained without withdrawal", "embedded: then briefly with it")


def by_layer(path):
    """The runs of a sweep, from the smallest K to none."""
    content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    of_layers = [run for run in content["runs"] if run["method"] is None or run["withdraw_layer"] is not None]
    runs = {run["withdraw_layer"]: run for run in of_layers}
    return [runs[layer] for layer in sorted(runs, key=lambda layer: 99 if layer is None else layer)]


def name(run):
    return "off" if run["withdraw_layer"] is None else str(run["withdraw_layer"])


def markdown(runs):
    """Accuracy by family, one row a K."""
    families = list(runs[0]["accuracy"])
    yield f"| K | {' | '.join(families)} | mean | unchanged | prefill saved |"
    yield f"| --- | {'---: | ' * (len(families) + 3)}".rstrip()
    for run in runs:
        cells = [*(run["accuracy"][family] for family in families), run["mean"], run["agreement"]]
        saved = 1 - run["prefill_flops"] / run["prefill_flops_without_withdrawal"]
        yield f"| {name(run)} | {' | '.join(f'{100 * cell:.1f}' for cell in (*cells, saved))} |"


def draw(sweeps):
    """Two panels of accuracy against K, and below each the share of the prefill that is left."""
    figure, axes = plt.subplots(
        2, 2, figsize=(10, 5.6), sharex=True, sharey="row", height_ratios=(3, 1), layout="constrained"
    )
    for (above, below), runs, title in zip(axes.T, sweeps, TITLES):
        places, names = range(len(runs)), [name(run) for run in runs]
        for family in runs[0]["accuracy"]:
            above.plot(places, [100 * run["accuracy"][family] for run in runs], lw=1.2, label=family)
        above.plot(places, [100 * run["mean"] for run in runs], "k", lw=2.5, label="mean")
        above.set(title=title, ylim=(0, 103))
        above.grid(alpha=0.3)
        left = [100 * run["prefill_flops"] / run["prefill_flops_without_withdrawal"] for run in runs]
        below.bar(places, left, color="#4a86c5")
        below.axhline(60, color="#b5413b", lw=1, ls="--")
        below.set(xlabel="K: visual tokens leave before this layer", ylim=(0, 105))
        below.set_xticks(places, names)
    axes[0, 0].set_ylabel("correct answers, %")
    axes[1, 0].set_ylabel("prefill\nFLOPs left, %")
    axes[0, 1].legend(loc="lower right", fontsize=8, ncols=2)
    figure.savefig(HERE / "accuracy.png", dpi=110)


if __name__ == "__main__":
    sweeps = [by_layer(path) for path in sys.argv[1:3]]
    draw(sweeps)
    for title, runs in zip(TITLES, sweeps):
        print(f"\n{title}\n", *markdown(runs), sep="\n")

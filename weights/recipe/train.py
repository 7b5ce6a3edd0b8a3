"""Train a model, one stage after the other. For the embedded one:

    python weights/recipe/train.py tower --minutes 25         the vision tower on its own
    python weights/recipe/train.py plain --minutes 75         the decoder behind it, never withdrawn
    python weights/recipe/train.py withdrawal --minutes 25    goes on from plain, now and then withdrawn

and, for minivtw-smol,

    python weights/recipe/train.py connector --minutes 3      patches become sums of SmolLM2's words
    python weights/recipe/train.py graft --minutes 76         SmolLM2 learns to see
    python weights/recipe/train.py taught --minutes 12        an experiment: to do without the image from layer 14 on

Each stage starts from what the one before left in RUNS, saves itself every few minutes and goes on where it stopped
when the same command is given again. Draw the pictures first (pool.py); export.py turns a checkpoint into a folder.
"""

import argparse
import os
import pathlib
import tempfile
from functools import partial

import torch
import torch.distributed as dist
from decoder import train_decoder
from graft import train_connector, train_graft
from pool import Pool
from runs import Run
from tower import train_tower

STAGES = {
    "tower": train_tower,
    "plain": partial(train_decoder, stage="plain"),
    "withdrawal": partial(train_decoder, stage="withdrawal"),
    "places": partial(train_decoder, stage="places"),
    "connector": train_connector,
    "graft": train_graft,
    "taught": partial(train_graft, taught=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--minutes", type=float, required=True, help="the stage's training time over all sittings")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path(__file__).parent / "runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one core each (default: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(train, (arguments, f"file://{meeting}/place"), arguments.workers)


def train(worker: int, arguments: argparse.Namespace, meeting: str) -> None:
    """One worker of a stage: each takes its share of every batch, and they average their gradients.

    Processes meet once a step, threads at every matrix product: on a machine that does other things too, threads wait
    for each other most of the time.
    """
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {worker % os.cpu_count()})
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=meeting, rank=worker, world_size=arguments.workers)
    run = Run(arguments.runs, arguments.stage, arguments.minutes, worker, arguments.workers)
    pool = Pool(arguments.runs / "pool")
    STAGES[arguments.stage](run, pool)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

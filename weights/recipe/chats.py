"""Plain text for the graft: what the base language model writes when it is left alone.

    python weights/recipe/chats.py --runs RUNS

Half of the rows begin as a chat does, so the model writes a user's question and its own answer to it (the trick of
Magpie, arXiv 2406.08464); the other half begin as a document. Drawn at temperature 1, they are samples of what the
model knows; training is asked to leave its predictions on them as they were. Written to `chats.npy`, (rows, TOKENS)
int32.
"""

import argparse
import pathlib

import numpy as np
import torch
from tokenizers import Tokenizer

from minivtw.checkpoints.hub import model_folder

ROWS, TOKENS, BATCH = 384, 160, 32
BEGINNINGS = ("<|im_start|>user\n", "<|endoftext|>")


@torch.inference_mode()
def write_texts(base: pathlib.Path, rows: int, tokens: int) -> np.ndarray:
    """Sampled token ids (rows, tokens), the first of them a beginning's."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    parts = []
    for number in range(rows // BATCH):
        begun = tokenizer.encode(BEGINNINGS[number % len(BEGINNINGS)]).ids
        ids = torch.tensor([begun] * BATCH)
        # An end of turn does not end the row: another turn follows.
        written = model.generate(ids, max_length=tokens, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=2)
        parts.append(written.numpy().astype(np.int32))
        print(f"{len(parts) * BATCH} of {rows} rows", flush=True)
    return np.random.default_rng(0).permutation(np.concatenate(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path(__file__).parent / "runs")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    np.save(arguments.runs / "chats.npy", write_texts(model_folder("smollm2"), ROWS, TOKENS))


if __name__ == "__main__":
    main()

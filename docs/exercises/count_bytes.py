"""How many bytes does the cache hold?

`tokens_per_layer` is how many tokens each layer's cache holds, as `cache.tokens_per_layer` gives it; `config` is
`vlm.config`. A token leaves a key and a value in a layer, each `config.kv_heads` vectors of `config.head_dim` numbers of
four bytes.
"""

from exercises import SCENE, expect, expect_number, model
from minivtw import Chat


def stub(tokens_per_layer, config):
    """tokens_per_layer: one number for each layer. Returns bytes."""
    return sum(tokens_per_layer) * config.head_dim * 4  # one vector for each token?


def solution(tokens_per_layer, config):
    """tokens_per_layer: one number for each layer. Returns bytes."""
    return sum(tokens_per_layer) * 2 * config.kv_heads * config.head_dim * 4


def check(count_bytes):
    for withdraw in (None, 6):
        chat = Chat(model(), withdraw)
        chat.ask("How many objects are there?", SCENE, max_new_tokens=1)
        held, wanted = chat.cache.tokens_per_layer, chat.cache.nbytes
        found = count_bytes(held, chat.vlm.config)
        expect_number(found)
        heads = chat.vlm.config.heads // chat.vlm.config.kv_heads
        expect(found != wanted // 2, "that is half of it: a token leaves a key and a value")
        expect(found != wanted * heads, "only the key heads are stored, kv_heads of them, not one for each query head")
        expect(found == wanted, f"the cache of {held} tokens holds {wanted:,} bytes, not {found:,}")
    return "473 kB without withdrawal, 276 kB with the image withdrawn before layer 6"

"""Where did the image leave?

Somebody hands you a `KVCache` without a word about K, the layer before which the image was withdrawn.
`cache.tokens_per_layer` says how many tokens each layer holds, `cache.next_position` how many the conversation has had.
Return K: the first layer whose cache lacks some of them; `None` if every layer holds them all.
"""

from exercises import SCENE, expect, model
from minivtw import Chat


def stub(cache):
    """cache: a KVCache. Returns a layer, or None."""
    return len(cache.tokens_per_layer) // 2  # the middle is a guess


def solution(cache):
    """cache: a KVCache. Returns a layer, or None."""
    for layer, held in enumerate(cache.tokens_per_layer):
        if held < cache.next_position:
            return layer
    return None


def check(where_it_leaves):
    for withdraw in (5, 9, 11, None, 0):
        chat = Chat(model(), withdraw)
        chat.ask("What color is the star?", SCENE, max_new_tokens=2)
        found, held = where_it_leaves(chat.cache), chat.cache.tokens_per_layer
        said = f"tokens per layer {held}, {chat.cache.next_position} in all: the image left before layer {withdraw}"
        if withdraw is None:
            said = f"with tokens per layer {held} the image never left: the answer is None"
        expect(found == withdraw and type(found) is not bool, f"{said}, not {found}")
    return "the lengths of the caches tell K, also where no layer ever saw the image"

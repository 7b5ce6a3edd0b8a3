"""How many operations and bytes a decoder takes, by formula.

Derivation. A matrix product (n, i) @ (i, o) is n * i * o multiplications and as many additions: 2 n i o FLOPs. With
n new tokens and m tokens in the layer's cache afterwards, one layer computes

    q, k, v     (n, width) @ (width, (heads + 2 kv_heads) head_dim)
    scores      per head (n, head_dim) @ (head_dim, m)
    context     per head (n, m) @ (m, head_dim)
    output      (n, heads head_dim) @ (heads head_dim, width)
    gate, up    (n, width) @ (width, 2 mlp_width)
    down        (n, mlp_width) @ (mlp_width, width)

and the head turns the last token alone into logits. Norms, rotations and softmax are left out: they grow with
n width, not with n width^2. Scores are counted in full, masked or not, because that is what is computed. A test
compares these formulas with the matrix products that really happen.
"""


def layer_flops(config, new, cached):
    """One decoder layer: `new` tokens enter, after which its cache holds `cached`."""
    width, query, key_value = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    projections = width * (query + 2 * key_value) + query * width  # multiplications a token
    feed_forward = 3 * width * config.mlp_width
    return 2 * new * (projections + feed_forward) + 4 * new * cached * query


def head_flops(config):
    """The logits of one token."""
    return 2 * config.width * config.vocabulary


def prefill_flops(config, tokens, staying=0, layer=None, cached=None):
    """A whole prompt of `tokens`, of which `staying` remain from `layer` on (None: all, everywhere).

    `cached`: tokens that each layer's cache held before, a list (None: a fresh cache).
    """
    cached = cached or [0] * config.layers
    total = head_flops(config)
    for index, before in enumerate(cached):
        new = tokens if layer is None or index < layer else staying
        total += layer_flops(config, new, before + new)
    return total


def decode_flops(config, tokens_per_layer, steps):
    """`steps` tokens fed back one at a time, on caches that hold `tokens_per_layer` before the first of them."""
    total = steps * head_flops(config)
    for tokens in tokens_per_layer:
        total += sum(layer_flops(config, 1, tokens + step) for step in range(1, steps + 1))
    return total


def cache_bytes(config, tokens_per_layer):
    """Keys and values in float32."""
    return sum(2 * 4 * config.kv_heads * config.head_dim * tokens for tokens in tokens_per_layer)

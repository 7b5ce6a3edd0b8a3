"""Pictures and conversations that the recordings and the tests share; free of torch."""

import numpy as np
from PIL import Image

# (width, height) from a single pixel to a thread, wide and tall, smaller and larger than a tile
SIZES = (
    (1, 1), (2, 3), (31, 31), (32, 32), (33, 32), (64, 48), (67, 40), (40, 131), (200, 199), (640, 480), (3000, 200),
    (1, 500),
)  # fmt: skip


def picture(width, height):
    """A picture with edges, gradients and noise, the same every time."""
    random = np.random.default_rng(width * 10_000 + height)
    rows, columns = np.mgrid[:height, :width]
    disc = 255 * ((rows - height / 2) ** 2 + (columns - width / 3) ** 2 < (min(width, height) / 3) ** 2)
    levels = np.stack([rows * 255 / height, columns * 255 / width, disc], -1)
    noise = random.integers(-6, 6, levels.shape)
    return Image.fromarray(np.clip(levels + noise, 0, 255).astype(np.uint8))


def conversation_messages(images, turns):
    """Turns, a question first and then answers and questions in turn, as chat templates take them; images first."""
    messages = []
    for index, text in enumerate(turns):
        content = [{"type": "image"}] * (images if index == 0 else 0) + [{"type": "text", "text": text}]
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    return messages

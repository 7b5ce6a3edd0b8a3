"""Which tokens go on: choosing rows of a batch, putting them back, and the mask for the rows and keys that are left.

Prompts of a batch may keep different numbers of tokens. What is left of each is aligned right, so that the last row is
every prompt's last token, and what is missing before are *holes*: rows that nobody may see. *Places* count the tokens
of a conversation as its cache does, the padding included.
"""

from typing import NamedTuple

import torch

from ..errors import InputError


class Rows(NamedTuple):
    """Some of the tokens of a forward pass, for each prompt of the batch."""

    index: torch.Tensor  # (batch, rows): which of the forward's tokens; in a hole, the prompt's first chosen one again
    hole: torch.Tensor | None  # (batch, rows) booleans; None where no prompt has fewer rows than another
    origin: tuple[torch.Tensor, torch.Tensor]  # prompt and token of every row that is no hole, in order


def rows_of(chosen: torch.Tensor) -> Rows:
    """(batch, tokens) booleans -> `Rows`."""
    counts = chosen.sum(1)  # (batch,)
    most = int(counts.max())
    index = chosen.to(torch.uint8).argsort(dim=1, stable=True)[:, chosen.shape[1] - most :]  # (batch, rows)
    hole = torch.arange(most, device=chosen.device) < (most - counts)[:, None]  # (batch, rows)
    origin = chosen.nonzero(as_tuple=True)
    if len(origin[0]) == hole.numel():
        return Rows(index, None, origin)
    first = index.gather(1, (most - counts)[:, None].clamp(max=most - 1))  # (batch, 1)
    return Rows(torch.where(hole, first, index), hole, origin)


def take(states: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(…, batch or 1, tokens, width) -> (…, batch, rows, width)."""
    index = rows.index.to(states.device)[..., None]  # (batch, rows, 1)
    states = states.expand(*states.shape[:-3], len(index), *states.shape[-2:])
    return states.gather(-2, index.expand(*states.shape[:-2], index.shape[1], states.shape[-1]))


def put(states: torch.Tensor, rows: Rows, changed: torch.Tensor) -> torch.Tensor:
    """A copy of states (batch, tokens, width) in which the rows, holes apart, hold `changed` (batch, rows, width)."""
    changed = changed.flatten(0, 1) if rows.hole is None else changed[~rows.hole.to(changed.device)]
    return states.index_put(tuple(index.to(states.device) for index in rows.origin), changed.to(states.device))


class Keys(NamedTuple):
    """The tokens whose keys a layer reads."""

    places: torch.Tensor  # (batch, keys); -1 in a hole
    whole: bool = True  # without holes
    ordered: bool = True  # by place: if not, only the mask knows who comes before whom

    def grown(self, rows: Rows | None, past: int, total: int) -> "Keys":
        """These and the rows of a forward pass over the places from `past` to `total`; rows: None for all of them."""
        if rows is None:
            places = torch.arange(past, total, device=self.places.device).expand(len(self.places), -1)
            return self._replace(places=torch.cat([self.places, places], 1))
        places = rows.index + past
        places = places if rows.hole is None else places.masked_fill(rows.hole, -1)
        return self._replace(places=torch.cat([self.places, places], 1), whole=self.whole and rows.hole is None)

    def spread(self, batch: int) -> "Keys":
        """For a batch that was repeated since, as `cache.batch_repeat_interleave` does."""
        if len(self.places) == batch:
            return self
        if batch % len(self.places):
            raise InputError(f"the cache holds {len(self.places)} prompts with withdrawn tokens, but {batch} go on")
        return self._replace(places=self.places.repeat_interleave(batch // len(self.places), 0))


def all_keys(batch: int, tokens: int, device: torch.device) -> Keys:
    """Nothing has left: `Keys` at places 0 … tokens - 1."""
    return Keys(torch.arange(tokens, device=device).expand(batch, -1))


def causal_mask(query: torch.Tensor, keys: Keys, window: int | None, sees_later: bool = False) -> torch.Tensor:
    """Which query may see which key, by their places alone: (batch, 1, rows, keys) booleans.

    query: (batch, rows) places; window: how far a local layer looks back, or None; sees_later: it is not causal.
    """
    query, places = query[:, None, :, None], keys.places[:, None, None]
    seen = (places >= 0) & ((places <= query) | sees_later)
    return seen if window is None else seen & (places > query - window)


def narrow_mask(mask: torch.Tensor, rows: Rows | None, keys: Keys, total: int) -> torch.Tensor:
    """What is left of a layer's mask for some rows and keys.

    mask: (batch, keys), or (batch or 1, heads or 1, tokens, keys) booleans or addends, where its last key is at place
    total - 1; rows: None for all. Returns the same kind of mask.
    """
    column = keys.places.to(mask.device) - (total - mask.shape[-1])  # (batch, keys)
    unseen, column = column < 0, column.clamp(min=0)  # holes, and tokens that a local layer no longer looks at
    if mask.ndim == 2:
        return mask.gather(1, column) & ~unseen
    mask = mask.expand(len(column), *mask.shape[1:])
    if rows is not None:
        index = rows.index.to(mask.device)[:, None, :, None]
        mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, column[:, None, None].expand(-1, *mask.shape[1:3], -1))
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(unseen[:, None, None], lowest)

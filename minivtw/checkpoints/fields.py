"""The fields of a config file, each read with its type and its range checked."""

from collections.abc import Callable, Iterable
from typing import Any

from ..errors import InputError

REQUIRED: Any = object()
MOST = 10_000_000  # of an integer, where a config gives no reason for less


def is_integer(value: Any, least: int, most: int) -> bool:
    """Whether a value of JSON is an integer (true is none) from `least` to `most`."""
    return type(value) is int and least <= value <= most


class Fields:
    """One JSON object of a config; `where` names it in errors. A default stands in for an absent or null key.

    names: key -> what this object calls it, where that differs.
    """

    def __init__(self, values: dict[str, Any], where: str, names: dict[str, str] | None = None) -> None:
        self._values = values
        self.where = where
        self._names = names or {}

    def renamed(self, names: dict[str, str]) -> "Fields":
        """The same object, to be asked for other keys than its own, none of which it may lack; names: as above."""
        for own_key in names.values():
            if not self.has(own_key):
                raise self.error(f"lacks {own_key}")
        return Fields(self._values, self.where, names)

    def _get(self, key: str, default: Any, fits: Callable[[Any], bool], kind: str) -> Any:
        value, own_key = self.raw(key), self._names.get(key, key)
        if value is None:
            if default is REQUIRED:
                raise self.error(f"lacks {own_key}")
            return default
        if not fits(value):
            raise InputError(f"{own_key} in {self.where} must be {kind}, not {repr(value)[:80]}")
        return value

    def has(self, key: str) -> bool:
        """Whether the key is there, and not null."""
        return self.raw(key) is not None

    def positive_int(self, key: str, default: Any = REQUIRED, most: int = MOST) -> int:
        """An integer from 1 to `most`."""
        return self._get(key, default, lambda v: is_integer(v, 1, most), f"a whole number from 1 to {most:,}")

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        """An integer of either sign: a layer counted from the front or the back, a token id."""
        return self._get(key, default, lambda v: is_integer(v, -MOST, MOST), "a whole number")

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A number above 0, within reason."""
        fits = lambda v: type(v) in (int, float) and 1e-12 <= v <= 1e12
        return float(self._get(key, default, fits, "a number above 0"))

    def triple(self, key: str, default: Any = REQUIRED, least: float = -1e6) -> tuple[float, float, float]:
        """A list of three numbers, none below `least`: one for each channel."""
        is_one = lambda n: type(n) in (int, float) and least <= n <= 1e6
        fits = lambda v: isinstance(v, list) and len(v) == 3 and all(map(is_one, v))
        first, second, third = self._get(key, default, fits, f"a list of 3 numbers from {least:g} to 1e6")
        return first, second, third

    def pairs(self, key: str, count: int, most: int) -> tuple[tuple[int, int], ...]:
        """A list of at most `count` pairs of integers from 1 to `most`, as tuples."""
        is_pair = lambda v: isinstance(v, list) and len(v) == 2 and all(is_integer(n, 1, most) for n in v)
        fits = lambda v: isinstance(v, list) and 0 < len(v) <= count and all(map(is_pair, v))
        kind = f"a list of at most {count:,} pairs of whole numbers from 1 to {most:,}"
        return tuple((first, second) for first, second in self._get(key, REQUIRED, fits, kind))

    def ids(self, key: str) -> frozenset[int]:
        """A token id or a list of them, as a set; empty where the key is absent."""
        listed = lambda v: v if isinstance(v, list) else [v]
        fits = lambda v: all(is_integer(n, -MOST, MOST) for n in listed(v))
        return frozenset(listed(self._get(key, [], fits, "a token id or a list of them")))

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        """true or false."""
        return self._get(key, default, lambda v: type(v) is bool, "true or false")

    def choice(self, key: str, choices: Iterable, default: Any = REQUIRED) -> Any:
        """One of a few values that are supported."""
        fits = lambda v: any(v == choice and type(v) is type(choice) for choice in choices)
        return self._get(key, default, fits, "one of " + ", ".join(map(repr, choices)))

    def refuse_unless(self, **expected: Any) -> None:
        """Refuse by its name every key whose value asks for something that is not computed here."""
        for key, expects in expected.items():
            value = self.raw(key)
            if value is not None and value != expects:
                computed = "nothing like it" if expects is None else f"only {repr(expects)[:80]}"
                raise InputError(f"{key} in {self.where} is {repr(value)[:80]}, and {computed} is computed here")

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """Text."""
        return self._get(key, default, lambda v: isinstance(v, str), "text")

    def texts(self) -> dict[str, str]:
        """All of the object, every value of which must be text."""
        return {key: self.text(key) for key in self._values}

    def section(self, key: str, default: Any = REQUIRED) -> "Fields":
        """A nested object, as `Fields`."""
        values = self._get(key, default, lambda v: isinstance(v, dict), "an object")
        return Fields(values, f"{key} of {self.where}")

    def raw(self, key: str) -> Any:
        """The value as it stands; None where there is none."""
        return self._values.get(self._names.get(key, key))

    def error(self, message: str) -> InputError:
        """An InputError that begins with where this object is."""
        return InputError(f"{self.where} {message}")

"""The fields of a config file, each read with its type checked."""

from ..errors import InputError

REQUIRED = object()


class Fields:
    """One JSON object of a config; `where` names it in errors. A default stands in for an absent or null key."""

    def __init__(self, values, where):
        self._values = values
        self._where = where

    def _get(self, key, default, fits, kind):
        value = self._values.get(key)
        if value is None:
            if default is REQUIRED:
                raise InputError(f"{self._where} lacks {key}")
            return default
        if not fits(value):
            raise InputError(f"{key} in {self._where} must be {kind}, not {value!r}")
        return value

    def has(self, key):
        return self._values.get(key) is not None

    def whole(self, key, default=REQUIRED):
        """A whole number, 1 or more."""
        return self._get(key, default, lambda v: type(v) is int and v > 0, "a whole number above 0")

    def index(self, key, default=REQUIRED):
        """A whole number of either sign: a layer counted from the front or the back, a token id."""
        return self._get(key, default, lambda v: type(v) is int, "a whole number")

    def number(self, key, default=REQUIRED):
        """A number above 0."""
        return float(
            self._get(key, default, lambda v: type(v) in (int, float) and 0 < v < float("inf"), "a number above 0")
        )

    def numbers(self, key, count, default=REQUIRED):
        """A list of `count` numbers."""
        fits = lambda v: isinstance(v, list) and len(v) == count and all(type(n) in (int, float) for n in v)
        return tuple(self._get(key, default, fits, f"a list of {count} numbers"))

    def flag(self, key, default=REQUIRED):
        """true or false."""
        return self._get(key, default, lambda v: type(v) is bool, "true or false")

    def choice(self, key, choices, default=REQUIRED):
        """One of a few values that are supported."""
        return self._get(key, default, lambda v: v in choices, "one of " + ", ".join(map(repr, choices)))

    def text(self, key, default=REQUIRED):
        return self._get(key, default, lambda v: isinstance(v, str), "text")

    def texts(self):
        """All of the object, when every value of it is text."""
        if not all(isinstance(value, str) for value in self._values.values()):
            raise InputError(f"{self._where} must map names to text")
        return dict(self._values)

    def part(self, key, default=REQUIRED):
        """A nested object, as `Fields`."""
        values = self._get(key, default, lambda v: isinstance(v, dict), "an object")
        return Fields(values, f"{key} of {self._where}")

    def raw(self, key, default=None):
        """The value as it stands."""
        return self._values.get(key, default)

    def error(self, message):
        return InputError(f"{self._where} {message}")

"""The one error that a user is meant to see."""


class InputError(ValueError):
    """Something the caller gave cannot be used; the message is one complete sentence for them."""

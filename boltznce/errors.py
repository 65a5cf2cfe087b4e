"""The one exception that means: the user can mend this; and how its message names many things."""

from collections.abc import Sequence

__all__ = ["UserError", "first_few"]


class UserError(ValueError):
    """A mistake in a setting or an input file, told in one sentence that names the remedy.

    Commands print the message without a stack trace and exit with status 2; in a notebook it is a ``ValueError``.
    """


def first_few(words: Sequence[str], most: int = 4) -> str:
    """The first of ``words`` for a message, and how many more there are.

    >>> first_few(["seed: 0, not 7", "budget: cpu, not long"], most=1)
    'seed: 0, not 7; and 1 more'
    """
    return "; ".join(words[:most]) + (f"; and {len(words) - most} more" if len(words) > most else "")

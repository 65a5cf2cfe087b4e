"""The one exception that means: the user can mend this."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake in a setting or an input file, told in one sentence that names the remedy.

    Scripts print the message without a stack trace and exit with status 2; in a notebook it is a ``ValueError``.
    """

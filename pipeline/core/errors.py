"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in what the user gave: configuration, data, model or index.

    The message is one sentence or two: what is wrong, where (file and line, or configuration key), and how to mend
    it. The command line prints it without a traceback and exits with code 2.
    """

"""The exceptions that a command ends by without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: configuration, data, model or index.

    The message is one sentence or two: what is wrong, where (file and line, or configuration key), and how to mend
    it. The command line prints it without a traceback and exits with code 2.
    """


class RunError(RuntimeError):
    """A run cannot go on, and no mistake of the user's is known: something failed too often, or taught nothing.

    The command line prints the message and how to go on, and exits with code 1. The log of the run has the traceback.
    """

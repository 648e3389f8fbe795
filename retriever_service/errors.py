"""What goes wrong in the retriever, by whose fault it is."""


class RetrieverError(ValueError):
    """A bad corpus, encoder, index or request. The message says what, where and how to mend it."""


class RetrieverOverloaded(RuntimeError):
    """A replica has as many queries waiting as it is allowed to hold; the same request may succeed later."""


class RetrieverUnavailable(RuntimeError):
    """No replica answered within the allowed attempts; not the user's mistake. The message has the cause."""

"""What goes wrong in the retriever, by whose fault it is. All of them can be pickled: actors send them."""


class RetrieverError(ValueError):
    """A bad corpus, encoder, index or request. The message says what, where and how to mend it."""


class RetrieverOverloaded(RuntimeError):
    """A replica has as many queries waiting as it is allowed to hold; the same request may succeed later.

    `retry_after_s`: after so many seconds the queue should be empty, by the rate of late.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RetrieverUnavailable(RuntimeError):
    """No replica answered within the allowed attempts; not the user's mistake. The message has the cause."""


class RetrieverTimeout(TimeoutError):
    """A request's deadline passed before it was answered."""

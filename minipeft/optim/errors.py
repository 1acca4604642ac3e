"""What goes wrong while state moves."""


class PagingError(RuntimeError):
    """Optimizer state could not be moved, or did not come back as it went; the message says what and where."""

"""What the commands share: errors that a user can mend end a command with a message."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_with_message() -> Iterator[None]:
    """A user's error ends the process with "error: …" and without a traceback, which is logged at level DEBUG."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        logging.getLogger("cde_jax").debug("the traceback", exc_info=True)
        sys.exit(f"error: {error}")

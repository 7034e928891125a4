"""A user's mistake, answered by one sentence and exit code 2."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Says what was looked for, where, and what mends it. Reaches the user without a traceback."""


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its code; a `UserError` is printed as one sentence, exit code 2.

    `OSError` for a full disk or a missing permission is answered in the same way.
    """
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(_complain(f"{error.strerror}: {error.filename or 'while writing'}."))


def _complain(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2

"""The errors a user may meet: one line that names the file and the remedy."""


class SpcxrError(Exception):
    """Something the caller can put right. The message is one line: what, where, and the remedy.

    The commands print it without a traceback (``--debug`` shows one) and exit with ``exit_code``.

    >>> raise SpcxrError("runs/a: this folder holds another run; choose a new --out")
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: runs/a: this folder holds another run; choose a new --out
    """

    exit_code = 2


class NothingDone(SpcxrError):
    """The request was sound, yet nothing could be done (every file rejected, say): exit code 1."""

    exit_code = 1


class Interrupted(SpcxrError):
    """Ctrl-C or SIGTERM arrived: the work so far is saved, and the message says how to go on."""

    exit_code = 130

"""The one exception that a user is meant to read, the operating system's errors in its words, and its console."""

from __future__ import annotations

import errno

from rich.console import Console

# given by a wrong path or a disk: no fault of the program
FILE_ERRORS = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EINVAL, errno.EIO, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS,
}  # fmt: skip


class UserError(Exception):
    """A mistake of the user's in one sentence: what is wrong, which value, and what to do.

    Command lines print the sentence and exit with status 2; nothing is half-written when it is raised.
    """


def file_trouble(error: Exception) -> str | None:
    """One sentence about a file that could not be read or written; None: the error is about something else."""
    from safetensors import SafetensorError

    rust = type(error) is Exception and "(os error " in str(error)  # tokenizers has no class of its own for it
    if rust or isinstance(error, SafetensorError):
        what, reason = "a file" if rust else "a safetensors file", str(error)
    # pyarrow keeps the number to itself; network errors, which are OSErrors too, are of classes of their own
    elif isinstance(error, OSError) and (error.errno in FILE_ERRORS or (type(error) is OSError and not error.errno)):
        what = repr(str(error.filename)) if error.filename else "a file"
        reason = error.strerror or str(error) or type(error).__name__
    else:
        return None
    return (
        f"{what} could not be read or written ({' '.join(reason.split())}); see to the path, its permissions and the "
        "room on its disk, and repeat the command."
    )


def plain_console() -> Console:
    """A console that prints texts as they are: paths and names may hold [brackets] and :colons:, which rich reads."""
    return Console(markup=False, emoji=False, highlight=False)

"""What can go wrong, and the exit code of each kind.

    SFTError
    |- InputError            2   the request is wrong: missing file, wrong shape, unknown name
    |- BudgetError           1   the budget cannot be met; says what is feasible
    |- VerificationError     1   the exported file does not do what the model does
    |- RuntimeFailure        3   the target runtime crashed or refused the file
    '- LostProcessError      3   another process of the same work is gone

A message is one paragraph that repeats the user's own words (the layer's name, its shape, the
file) and says what to do.
"""


class SFTError(Exception):
    """Base of every error that SFT raises on purpose."""

    exit_code = 3


class InputError(SFTError):
    """The request or its data is wrong; nothing was changed."""

    exit_code = 2


class BudgetError(SFTError):
    """The budget cannot be met; the message says what is feasible."""

    exit_code = 1


class VerificationError(SFTError):
    """The exported file failed its check."""

    exit_code = 1


class RuntimeFailure(SFTError):  # noqa: N818 (RuntimeError is Python's)
    """The target runtime crashed on the file, or refused it."""

    exit_code = 3


class LostProcessError(SFTError):
    """Another of the processes that share the work is gone; this one cannot go on."""

    exit_code = 3

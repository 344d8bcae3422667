"""Refusals: what this package declines to do, said in one line and with an exit code for scripts.

A refusal is an expected answer, not a fault of the program: the command line prints its message without a
traceback and ends with :attr:`Refusal.exit_code`. Every message says what should be, what was found and what
to type next; none names a case or a patient (row numbers and counts do).

Example:
    >>> refusal = UsageRefusal("epsilon should be positive, found -1; choose one, such as --epsilon 8")
    >>> refusal.exit_code, isinstance(refusal, ValueError)
    (2, True)
"""

from typing import ClassVar


class Refusal(Exception):
    """A check failed: the request was understood and is declined.

    Attributes:
        exit_code: What ``nnunet-dp`` returns to the shell.
    """

    exit_code: ClassVar[int] = 1


class UsageRefusal(Refusal, ValueError):
    """The request itself does not make sense: an argument or an input file must be changed first."""

    exit_code: ClassVar[int] = 2


class BudgetRefusal(Refusal):
    """The request would spend more than the privacy budget holds."""

    exit_code: ClassVar[int] = 3

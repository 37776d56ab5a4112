"""How a command on ranks ends: an error is reported once, and every rank fails."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from megatron_direct.errors import UserError
from megatron_direct.runtime import attendance, files, parallel, ranks, stopping

# More than lies between ranks that were started together.
_SECONDS_TO_SPEAK = 5.0


class _Ended(Exception):
    """Leaves the context otherwise than by its normal end, at which ranks wait for each other."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def exit_status(work: Callable[[], Any], context: contextlib.AbstractContextManager, prog: str
                ) -> int:
    """That of ``work()`` in a context in which the ranks are connected: 0, 1 after an error, or
    that of a process that a signal ended."""
    try:
        with context:
            _report_errors(work, prog)
        return 0
    except _Ended as ended:
        return ended.status
    except UserError as error:
        _say_on_each_node(f"{prog}: error: {error}")
    except Exception:
        _say_on_each_node(f"{prog}: error: the ranks could not be connected.\n"
                          f"{traceback.format_exc()}")
    return 1


def _report_errors(work: Callable[[], Any], prog: str) -> None:
    try:
        work()
        parallel.barrier()  # nobody takes one that is done for one that is lost
        return
    except stopping.Stopped as stopped:
        parallel.say(f"{prog}: {stopped}")
        attendance.leave_early()
        raise _Ended(stopped.exit_code) from stopped
    except UserError as error:
        words = str(error)
    except Exception as error:
        attendance.await_verdict()
        if (number := stopping.requested()) is not None:  # others have left: this is why
            attendance.leave_early()
            raise _Ended(stopping.Stopped(number).exit_code) from error
        words = _words(error)
    parallel.speak_once(f"{prog}: error: {words}")
    attendance.leave_early("another rank ended with an error")
    raise _Ended(1)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and files.is_of_disk(error):
        return str(files.cannot_use(error.filename, error))
    lost = parallel.lost_rank(error)
    if lost:
        return (f"{lost} What was finished is kept: repeat the command, which resumes. Other "
                "messages above or on that node tell why; a rank that is slow rather than gone "
                "needs a larger --distributed-timeout-minutes.")
    return f"this was not expected.\n{''.join(traceback.format_exception(error))}"


def _say_on_each_node(text: str) -> None:
    """Where no rank hears another, one of each node speaks."""
    try:
        speaks = ranks.discover().local_rank == 0
    except UserError:
        speaks = True
    if speaks:
        print(text, file=sys.stderr, flush=True)
    else:
        time.sleep(_SECONDS_TO_SPEAK)  # a launcher ends all ranks as soon as one has ended

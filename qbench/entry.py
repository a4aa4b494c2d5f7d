"""How every command of qbench ends: with its exit status, and never with a traceback.

Imports nothing but the standard library's smallest parts, so that an interrupt is answered from the first moment on.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

FAILED, INTERRUPTED = 1, 130
SHOW = "QBENCH_TRACEBACK"  # set it to see where an unexpected error came from


def start() -> None:
    """To be called before a command's own imports: until it runs, nothing is begun, so an interrupt just ends it.

    No garbage is collected until `begin_work`: what is imported and composed is half a million objects that stay.
    """
    gc.disable()
    signal.signal(signal.SIGINT, _leave_at_once)
    sys.excepthook = _excepthook


def begin_work() -> None:
    """The request is understood, and what it asks for makes garbage."""
    gc.enable()


def end_as_interrupted() -> None:
    """From here on a request to end (SIGTERM) and a closed terminal (SIGHUP) are what Ctrl-C is: locks are given back.

    A signal that the caller ignores, as nohup does, stays ignored.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def leave(main: Callable[[], int], closed_pipe: int = 0) -> NoReturn:
    """Runs a command and ends the program with its exit status; 130 when it is interrupted.

    `closed_pipe` is the status when the reader of what `main` prints has seen enough (`| head -1`) before it ended.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # raises KeyboardInterrupt, so that locks are given back
    try:
        status = main()
    except SystemExit as error:  # argparse's
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BrokenPipeError:
        status = closed_pipe
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = INTERRUPTED
    signal.signal(signal.SIGINT, _leave_at_once)  # what is left is the interpreter's own tidying
    gc.freeze()  # which need not look for garbage among all that is imported: a quarter of a second
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # closed by its reader: the interpreter must not try again when it ends
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def unexpected(error: BaseException) -> str:
    """One sentence for an error that qbench did not foresee: what it was, and where; the whole of it when asked for."""
    if os.environ.get(SHOW):
        traceback.print_exception(error, file=sys.stderr)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}qbench{os.sep}" in frame.filename] or frames
    place = f", in {os.path.basename(ours[-1].filename)} line {ours[-1].lineno}" if ours else ""
    said = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}{place}: {said or 'no reason given'} ({SHOW}=1 shows the traceback)"


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        _leave_at_once(signal.SIGINT, None)
    print(f"qbench: {unexpected(error)}", file=sys.stderr)

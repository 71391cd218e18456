"""The entry point: find the verb, run it, turn what goes wrong into one line and an exit code.

0 is success, 2 bad input, 1 a failure (also: results that could not be printed), 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from learn2perturb import __version__
from learn2perturb.errors import ConfigError, Interrupted, Learn2PerturbError, TrainingError, UnknownNameError
from learn2perturb.plugins import OPTION, imported, without_imports
from learn2perturb.terminal import number_among, one_line, say, steady_streams, verbosity

if TYPE_CHECKING:
    import argparse

# verb -> what it does; the module of the same name has DESCRIPTION, EXAMPLE, add_arguments(parser), run(arguments)
VERBS = {
    "demo": "train three defenses on the digits, attack them, print them side by side (two minutes)",
    "train": "train a network with a defense; the same command again resumes",
    "evaluate": "attack a trained network and score it with fresh draws",
    "compare": "compare two evaluations, or two diagnoses, of the same images, with intervals",
    "diagnose": "check whether the robustness of a model is real: checks, curves, a verdict",
    "certify": "certify radii within which no attack changes the majority vote",
    "report": "write one HTML page of records and runs: claim, verdict, table, charts",
    "export": "write a trained network as safetensors, and a RobustBench model-info file",
    "study": "any experiment by one file: networks, attacks, seeds, tables; resumable, on one core or a cluster",
    "reproduce": "compute a table of the paper on trained runs, its numbers beside ours",
    "list": "show networks, attacks, defenses, data sets and recipes, with their options",
    "bench": "time training steps, attacks, data: execution modes against a baseline and the roofline",
}
SHARED = ("train", "evaluate", "diagnose", "certify")  # what several processes of torchrun do together
SUCCESS, FAILURE, BAD_INPUT = 0, 1, 2
COMPLETION = "--print-completion"
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")
_NOT_THE_PATH = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def usage() -> str:
    """Return the help of the whole command."""
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb.ljust(width)}  {summary}" for verb, summary in VERBS.items())
    return (
        "usage: learn2perturb VERB [options]      (l2p is short for learn2perturb)\n\n"
        "Learned noise in a network's features: train it, attack it, and know how robust it really is.\n\n"
        f"verbs:\n{lines}\n\n"
        "options:\n  --help           this page; learn2perturb VERB --help has the options of a verb\n"
        "  --version        the version\n"
        f"  {COMPLETION} bash|zsh  a script that completes verbs and options in your shell\n"
        "  --import MODULE  import a module or file of your own first, which registers attacks, defenses, ...\n\n"
        "example:\n  learn2perturb train --dataset digits --model digits_cnn --recipe fast --epochs 5\n"
    )


def _say(text: str) -> None:
    # One line: a program, or a tired reader, finds the whole message in it.
    say(f"learn2perturb: {one_line(text)}")


def _run(words: Sequence[str]) -> int:
    modules, rest = without_imports(words)
    with imported(modules):
        return _verb(rest, words)


def _verb(words: Sequence[str], command: Sequence[str]) -> int:
    """Run a verb; ``command`` is all that was typed, which records keep."""
    if not words:
        raise UnknownNameError(f"no verb given; choose one of {', '.join(VERBS)} (see learn2perturb --help)")
    verb, *rest = words
    if verb in ("--help", "-h", "help"):
        print(usage())
        return SUCCESS
    if verb == "--version":
        print(f"learn2perturb {__version__}")
        return SUCCESS
    if verb == COMPLETION:
        from learn2perturb.cli.completion import completion

        print(completion(rest[0] if rest else "", VERBS))
        return SUCCESS
    if verb not in VERBS:
        raise UnknownNameError.of("verb", verb, VERBS)
    rank, world = number_among()
    if world > 1 and verb not in SHARED:
        raise ConfigError(
            f"{verb} is the work of one process, and this is number {rank} of {world}; start it without torchrun "
            f"(several do {', '.join(SHARED)})"
        )
    from learn2perturb.cli.options import Parser, own_parts_told

    module = importlib.import_module(f"learn2perturb.cli.{verb}")
    parser = Parser(
        prog=f"learn2perturb {verb}", description=module.DESCRIPTION, epilog=f"example:\n  {module.EXAMPLE}"
    )
    module.add_arguments(parser)
    add_common(parser, planned=hasattr(module, "plan"))
    if {"--help", "-h"} & {*rest}:
        parser.epilog = f"{parser.epilog}{own_parts_told()}"
    arguments = parser.parse(rest)
    arguments.command = [*command]
    if getattr(arguments, "print_config", False) or getattr(arguments, "dry_run", False):
        module.plan(arguments).show(steps=arguments.dry_run, as_json=arguments.json)
        return SUCCESS
    with verbosity(arguments.verbose - arguments.quiet):
        code: int = module.run(arguments)
    return code


def add_common(parser: argparse.ArgumentParser, *, planned: bool) -> None:
    """Add the options that every verb has."""
    group = parser.add_argument_group("for every verb")
    group.add_argument("-q", "--quiet", action="count", default=0, help="no progress, only results and what went wrong")
    group.add_argument("-v", "--verbose", action="count", default=0, help="progress six times as often off a terminal")
    if planned:
        group.add_argument("--print-config", action="store_true", help="print all settings, filled; nothing is done")
        group.add_argument("--dry-run", action="store_true", help="check all that is given, say what would be done")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group.add_argument(
        OPTION, metavar="MODULE", help="import a module of your own first, which registers parts; may be repeated"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("LEARN2PERTURB_DEBUG", "") not in ("", "0")

    def one_line_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        _say(f"warning: {message}")

    def guarded() -> int:
        with warnings.catch_warnings(), _ending_on_signals(), contextlib.ExitStack() as stack:
            warnings.showwarning = one_line_warning
            if number_among()[0]:  # the first of several processes speaks; each prints its own errors
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                warnings.simplefilter("ignore")
            return _run(words)

    with steady_streams() as out:
        code = guarded() if debug else _coded(guarded)
        lost = out.settle()
        if lost is not None and not isinstance(lost, BrokenPipeError):  # a reader that has gone, such as head, is fine
            _say(f"error: standard output cannot be written ({_reason(lost)}); what was saved is saved")
            return code or FAILURE
    return code


def _coded(work: Callable[[], int]) -> int:
    """Return the exit code of ``work``, after one line of what went wrong."""
    try:
        return work()
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except Learn2PerturbError as error:
        _say(f"error: {error}")
        return FAILURE if isinstance(error, TrainingError) else BAD_INPUT
    except KeyboardInterrupt as stop:
        ended = stop if isinstance(stop, Interrupted) else Interrupted()
        if not number_among()[0]:  # once, of several processes
            _say(f"{ended}; type the same command again")
        return ended.exit_code
    except OSError as error:
        where = f" {str(error.filename)!r}" if error.filename else ""
        _say(f"error: cannot read or write{where}: {_reason(error)}; check the path, its rights and the disk")
        return FAILURE if error.errno in _NOT_THE_PATH else BAD_INPUT
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if "embedded null" in text:
            _say("error: a path holds a NUL character, which no file name may; write it without")
            return BAD_INPUT
        if isinstance(error, MemoryError) or any(said in text.lower() for said in _NO_MEMORY):
            _say(f"error: out of memory; give a smaller --batch-size, or another --device ({text[:200]})")
        else:
            _say(f"error: unexpected {text[:400]}; run it again with --debug and report the traceback")
        return FAILURE


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a verb as Ctrl-C does, cleaning up; a training, which can save, takes them itself."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may say what a signal does
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # not where nohup ignores it

    def end(number: int, _: object) -> None:
        raise Interrupted(number=number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())

"""The entry point: find the verb, run it, turn what goes wrong into one line and an exit code.

0 is success, 2 bad input, 1 a failure, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from learn2perturb import __version__
from learn2perturb.errors import Learn2PerturbError, TrainingError, UnknownNameError

# verb -> what it does; the module of the same name has DESCRIPTION, EXAMPLE, add_arguments(parser), run(arguments)
VERBS = {
    "demo": "train three defenses on the digits, attack them, print them side by side (two minutes)",
    "train": "train a network with a defense; the same command again resumes",
    "evaluate": "attack a trained network and score it with fresh draws",
    "compare": "compare two evaluations of the same images, with intervals",
    "diagnose": "check whether the robustness of a model is real: ten checks, a verdict",
    "certify": "certify radii within which no attack changes the majority vote",
    "export": "write a trained network as safetensors, and a RobustBench model-info file",
    "reproduce": "compute a table of the paper on trained runs, its numbers beside ours",
    "list": "show networks, attacks, defenses, data sets and recipes, with their options",
    "bench": "time training steps, attacks, data: gears against textbook code and the floor",
}
SUCCESS, FAILURE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_NOT_THE_PATH = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def usage() -> str:
    """Return the help of the whole command."""
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb.ljust(width)}  {summary}" for verb, summary in VERBS.items())
    return (
        "usage: learn2perturb VERB [options]      (l2p is short for learn2perturb)\n\n"
        "Learned noise in a network's features: train it, attack it, and know how robust it really is.\n\n"
        f"verbs:\n{lines}\n\n"
        "options:\n  --help     this page; learn2perturb VERB --help has the options of a verb\n"
        "  --version  the version\n\n"
        "example:\n  learn2perturb train --dataset digits --model digits_cnn --recipe fast --epochs 5\n"
    )


def _say(text: str) -> None:
    # One line: a program, or a tired reader, finds the whole message in it.
    print(f"learn2perturb: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _run(words: Sequence[str]) -> int:
    if not words:
        raise UnknownNameError(f"no verb given; choose one of {', '.join(VERBS)} (see learn2perturb --help)")
    verb, *rest = words
    if verb in ("--help", "-h", "help"):
        print(usage())
        return SUCCESS
    if verb == "--version":
        print(f"learn2perturb {__version__}")
        return SUCCESS
    if verb not in VERBS:
        raise UnknownNameError.of("verb", verb, VERBS)
    from learn2perturb.cli.options import Parser

    module = importlib.import_module(f"learn2perturb.cli.{verb}")
    parser = Parser(
        prog=f"learn2perturb {verb}", description=module.DESCRIPTION, epilog=f"example:\n  {module.EXAMPLE}"
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    code: int = module.run(parser.parse(rest))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("LEARN2PERTURB_DEBUG", "") not in ("", "0")

    def one_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        _say(f"warning: {message}")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = one_line
            code = _run(words)
            sys.stdout.flush()
            return code
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except Learn2PerturbError as error:
        if debug:
            raise
        _say(f"error: {error}")
        return FAILURE if isinstance(error, TrainingError) else BAD_INPUT
    except KeyboardInterrupt:
        if debug:
            raise
        _say("stopped by Ctrl-C; type the same command again")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except OSError as error:
        if debug:
            raise
        where = f" {str(error.filename)!r}" if error.filename else ""
        _say(f"error: cannot read or write{where}: {error.strerror or error}; check the path, its rights and the disk")
        return FAILURE if error.errno in _NOT_THE_PATH else BAD_INPUT
    except Exception as error:
        if debug:
            raise
        text = f"{type(error).__name__}: {error}"
        if "out of memory" in text.lower() or isinstance(error, MemoryError):
            _say(f"error: out of memory; give a smaller --batch-size, or another --device ({text[:200]})")
        else:
            _say(f"error: unexpected {text[:400]}; run it again with --debug and report the traceback")
        return FAILURE


if __name__ == "__main__":
    sys.exit(main())

"""Print the table of the zoo: ``python -m tests.literature [part of a name ...]``."""

from __future__ import annotations

import sys

from learn2perturb.terminal import markdown_row
from tests.literature.judged import HEAD, adaptive_accuracy, judged, row
from tests.literature.zoo import ZOO


def main(words: list[str]) -> None:
    """Print a row for each entry whose name holds one of ``words``, or for all."""
    print(markdown_row(HEAD))
    print(markdown_row(("---",) * len(HEAD)))
    for entry in ZOO:
        if not words or any(word in entry.name for word in words):
            print(row(judged(entry), adaptive_accuracy(entry)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

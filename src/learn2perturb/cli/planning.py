"""What a verb would do, for ``--print-config`` and ``--dry-run``: its settings, all filled, and its steps in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from learn2perturb.cli.options import print_json


@final
@dataclass(frozen=True)
class Plan:
    """What a verb would do.

    Attributes:
        settings: all of them, as a file of settings holds them.
        steps: what is done, one a line.
    """

    settings: dict[str, Any]
    steps: tuple[str, ...]

    def show(self, *, steps: bool, as_json: bool) -> None:
        """Print the steps, or the settings: as YAML, or as JSON."""
        from learn2perturb.records import plain

        if as_json:
            print_json(plain({"steps": list(self.steps), "settings": self.settings} if steps else self.settings))
        elif steps:
            print("\n".join([*self.steps, "nothing was done (--dry-run)"]))
        else:
            import yaml

            print(yaml.safe_dump(plain(self.settings), sort_keys=False).rstrip())

"""The command in a process of its own, with options from a JSON file. `python -m tests.domainbed.runs`."""

import json
import sys
from pathlib import Path

import torch

from stochca.config import DomainBedOptions
from stochca.domainbed import domainbed


def main() -> None:
    torch.set_num_threads(1)
    domainbed(DomainBedOptions(**json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()

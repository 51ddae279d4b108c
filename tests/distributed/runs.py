"""What each of two processes does: fine-tune with several options in turn."""

import json
import sys
from pathlib import Path

import torch

from stochca.config import FinetuneOptions
from stochca.distributed import processes
from stochca.train import finetune


def main() -> None:
    """Run all, and leave beside each run what it raised."""
    torch.set_num_threads(1)
    with processes("cpu") as world:
        for options in json.loads(Path(sys.argv[1]).read_text()):
            try:
                finetune(FinetuneOptions(**options))
            except (ValueError, OSError) as error:
                Path(f"{options['output']}.rank{world.rank}.error").write_text(str(error))


if __name__ == "__main__":
    main()

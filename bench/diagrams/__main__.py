"""`python -m bench.diagrams`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.diagrams import tiles
from bench.diagrams.matrix import draw
from bench.diagrams.step import CLASS_ROWS, TRUNCATED, step
from bench.digest import ROOT

FOLDER = ROOT / "docs" / "diagrams"


def diagrams() -> dict[str, str]:
    """All of them, as SVG by file name."""
    pictures = {
        "tiles-fwd-resident": tiles.forward_resident(),
        "tiles-fwd-streamed": tiles.forward_streamed(),
        "tiles-dq": tiles.backward_dq(),
        "tiles-joint": tiles.backward_joint(),
        "tiles-dkdv": tiles.backward_dkdv(),
        "tiles-tokens": tiles.tokens(),
        "tiles-projected": tiles.projected(),
    }
    steps = {
        "step-truncated": step("Nothing reads the source after its sixth block", TRUNCATED),
        "step-class-rows": step("The source is read after the last self-attention", CLASS_ROWS),
    }
    drawings = steps | {name: draw(picture) for name, picture in pictures.items()}
    return {f"{name}.svg": str(drawing) for name, drawing in drawings.items()}


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Write or check; arguments are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.diagrams", description="Draw the diagrams of the pages from the code."
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if one differs")
    check = parser.parse_args(arguments).check
    wanted = diagrams()
    found = {path.name: path.read_text() for path in folder.glob("*.svg")}
    differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    for name in differing:
        print(f"{folder.name}/{name}: {'differs, run `python -m bench.diagrams`' if check else 'written'}")
        if not check and name in wanted:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(wanted[name])
        elif not check:
            (folder / name).unlink()
    return 1 if differing and check else 0


if __name__ == "__main__":
    sys.exit(main())

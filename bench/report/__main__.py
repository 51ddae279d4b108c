"""`python -m bench.report`."""

import argparse
import sys
from collections.abc import Iterator, Sequence

from bench.report import pictures, scaling
from bench.report.pages import PAGES, render
from bench.report.plots import digest, drawn_from, save
from bench.report.recorded import Results


def main(arguments: Sequence[str] | None = None, results: Results | None = None) -> int:
    """Write or check; arguments are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Render recorded results into the pages: no number in them is typed.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a page differs")
    args = parser.parse_args(arguments)
    results = results or Results()
    differences = [*_pages(results, args.check), *_pictures(results, args.check)]
    for difference in differences:
        print(f"{difference}: {'differs, run `python -m bench.report`' if args.check else 'written'}")
    return 1 if differences and args.check else 0


def _pages(results: Results, check: bool) -> Iterator[str]:
    """Sections that said anything else."""
    for page, sections in PAGES.items():
        path = results.root / page
        try:
            text, differing = render(path.read_text(), sections, results)
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
        if differing and not check:
            path.write_text(text)
        yield from (f"{page}, section {name}" for name in differing)


def _pictures(results: Results, check: bool) -> Iterator[str]:
    """Pictures that showed anything else; those that nothing is recorded for are removed."""
    folder = results.root / pictures.FOLDER
    drawn = pictures.pictures(results) | scaling.pictures(results)
    wanted = {folder / f"{name}.svg": picture for name, picture in drawn.items()}
    for path, picture in wanted.items():
        if drawn_from(path) != digest(picture):
            if not check:
                folder.mkdir(exist_ok=True)
                save(picture, path)
            yield f"{pictures.FOLDER}/{path.name}"
    for path in sorted(set(folder.glob("*.svg")) - set(wanted)):
        if not check:
            path.unlink()
        yield f"{pictures.FOLDER}/{path.name}, of which nothing is recorded"


if __name__ == "__main__":
    sys.exit(main())

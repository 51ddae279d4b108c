"""Break the code on purpose and see that a test notices.

    python -m tests.mutants [NAME ...]

Each mutant replaces one text of one file in a copy of the tree and runs the tests that should fail there. One
that survives is a fact that no test checks.
"""

import argparse
import sys

from tests.mutants import dense, engine, export, images, method, operator, packaging, projections, weights
from tests.mutants.mutant import Workshop

MUTANTS = [
    *operator.MUTANTS,
    *projections.MUTANTS,
    *method.MUTANTS,
    *engine.MUTANTS,
    *dense.MUTANTS,
    *weights.MUTANTS,
    *images.MUTANTS,
    *export.MUTANTS,
    *packaging.MUTANTS,
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", choices=[[], *(mutant.name for mutant in MUTANTS)], metavar="NAME"
    )
    names = parser.parse_args().names
    survivors = []
    with Workshop() as workshop:
        for mutant in MUTANTS:
            if not names or mutant.name in names:
                noticed = workshop.noticed(mutant)
                survivors += [mutant.name] * (noticed is None)
                verdict = "SURVIVED" if noticed is None else "killed  "
                sys.stdout.write(f"{verdict} {mutant.name} {workshop.seconds:.1f} s {noticed or ''}\n")
                sys.stdout.flush()
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether Triton's code can compute an offset of a pointer that does not fit the integers it is computed in.

Each integer of a program is followed from the kernel's arguments to the offsets of pointers, as the interval
that it can lie in. An addition, a subtraction, a product, a loop or a cast whose exact result may lie outside
its type marks the integer, and all that is computed from it. A program holds where no mark reaches a
`tt.addptr`. What is not understood is marked as well.

The intervals start from `BOUNDS`: strides are any 32-bit number; lengths and grids are far beyond what a GPU
holds. Two relations that intervals do not know are known besides: `x % n * (y // n) <= y`, and `i * n <= y`
of an index that ends before `y // n`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

# Largest and smallest of arguments by the beginning of their names. There is a key at least (`checks.py`).
BOUNDS = {
    "stride_": (0, 2**31 - 1),
    "len_kv": (1, 2**23),
    "len_": (0, 2**23),
    "channels": (1, 2**23),
    "first_row": (0, 2**23),
    "num_heads": (1, 2**16),
    "num_lanes": (1, 2**21),
    "num_blocks": (1, 2**21),
    "num_splits": (1, 32),
    "num_items": (1, 2**29),
    "num_rows": (1, 2**29),
}
# Most programs of a grid by its axis; CUDA has no more along the others than the first.
PROGRAMS = {"x": 2**29, "y": 2**16, "z": 2**16}

_WORD = re.compile(r"%[\w.$#]+")
_RESULT = re.compile(r"\s*(%[\w.$]+)(?::\d+)? = \"?([\w.]+)\"?(.*)")
_LOOP = re.compile(r"\s*(?:%[\w.$]+(?::\d+)? = )?scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+)")
_ARGUMENT = re.compile(r"(%\w+): i(\d+)\b")
# Of these the result is one operand, laid out otherwise.
_SAME = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi"}


class Integer(NamedTuple):
    """What is known of an integer: it lies from `low` to `high`, unless one of `marks` happened.

    Args:
        low: Smallest.
        high: Largest.
        marks: What may have left its type on the way here.
        operation: That made it, with what it is made of.
    """

    low: int
    high: int
    marks: frozenset[str] = frozenset()
    operation: tuple[str, tuple["Integer", ...]] = ("", ())


class Report(NamedTuple):
    """What was found.

    Args:
        offsets: Offsets of pointers that were followed.
        wide: How many of them are of 64 bits.
        marks: What may overflow on the way to one of them.
    """

    offsets: int
    wide: int
    marks: list[str]


def overflows(code: str) -> Report:
    """Follow the integers of one program, whose code Triton prints with names."""
    known: dict[str, Integer] = {}
    offsets, wide, marks = 0, 0, set()
    for line in code.splitlines():
        line = re.sub(r" loc\(.*", "", line) if "tt.func" not in line else line
        if "tt.func" in line:
            known |= {name: _argument(name, int(bits)) for name, bits in _ARGUMENT.findall(line)}
        elif loop := _LOOP.match(line):
            known[loop[1]] = _index(line, *(known.get(name, _unknown(name)) for name in loop.groups()[1:]))
        elif (result := _RESULT.match(line)) is not None:
            name, operation, rest = result.groups()
            body, _, types = rest.rpartition(" : ")
            operands = [known.get(word, _unknown(word)) for word in _WORD.findall(body)]
            if operation == "tt.addptr":
                offsets += 1
                wide += "i64" in types
                marks |= operands[1].marks
                known.pop(name, None)
            elif (bits := re.search(r"(?:\b|x)i(\d+)>?\s*$", types)) is not None:
                known[name] = _result(line.strip(), operation, body, operands, int(bits[1]))
            else:
                known.pop(name, None)  # of a sibling region
    return Report(offsets, wide, sorted(marks))


def _argument(name: str, bits: int) -> Integer:
    for start, (low, high) in BOUNDS.items():
        if name.removeprefix("%").startswith(start):
            return Integer(low, high)
    return _unknown(name)


def _unknown(name: str) -> Integer:
    return Integer(0, 0, frozenset({f"{name} is not known"}))


def _index(line: str, first: Integer, end: Integer, step: Integer) -> Integer:
    """The index of a loop, which is also compared with the end once it has passed it."""
    marks = first.marks | end.marks | step.marks
    high = max(first.low, end.high - 1)
    if high + step.high > 2**31 - 1 or step.low < 0:
        marks |= {line.strip()}
    return Integer(first.low, high, marks, ("index", (first, end, step)))


def _result(line: str, operation: str, body: str, operands: Sequence[Integer], bits: int) -> Integer:
    if operation == "arith.constant":
        return _constant(body)
    if operation == "tt.make_range":
        end, start = re.findall(r"= (\d+)", body)
        return Integer(int(start), int(end) - 1)
    if operation == "tt.get_program_id":
        return Integer(0, PROGRAMS[body.strip()] - 1)
    if operation == "tt.get_num_programs":
        return Integer(1, PROGRAMS[body.strip()])
    if operation == "arith.cmpi" or bits == 1:
        return Integer(0, 1)
    if operation in _SAME:
        return operands[0]
    if operation == "arith.select":
        _, one, other = operands
        return Integer(min(one.low, other.low), max(one.high, other.high), one.marks | other.marks)
    marks = frozenset().union(*(operand.marks for operand in operands))
    interval = _interval(operation, operands)
    if interval is None or interval[0] < -(2 ** (bits - 1)) or interval[1] >= 2 ** (bits - 1):
        marks |= {line}
        interval = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Integer(*interval, marks, (operation, tuple(operands)))


def _constant(body: str) -> Integer:
    value = re.search(r"dense<(.*?)>|(true|false)|(-?\d+)\s*$", body.strip())
    if value is None:
        return _unknown(body)
    text = next(group for group in value.groups() if group is not None)
    number = {"true": 1, "false": 0}.get(text)
    if number is None and not re.fullmatch(r"-?\d+", text):
        return _unknown(body)
    number = int(text) if number is None else number
    return Integer(number, number)


def _interval(operation: str, operands: Sequence[Integer]) -> tuple[int, int] | None:
    """Smallest and largest exact result of an operation on two integers; None of one that is not known."""
    if operation == "arith.trunci":
        return operands[0].low, operands[0].high
    if len(operands) != 2:
        return None
    a, b = operands
    if operation == "arith.addi":
        return a.low + b.low, a.high + b.high
    if operation == "arith.subi":
        return a.low - b.high, a.high - b.low
    if operation == "arith.minsi":
        return min(a.low, b.low), min(a.high, b.high)
    if operation == "arith.maxsi":
        return max(a.low, b.low), max(a.high, b.high)
    if operation == "arith.muli":
        products = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
        return min(products), min(max(products), _most(a, b), _most(b, a))
    if operation == "arith.divsi" and b.low > 0:
        quotients = [
            int(x / y) if abs(x) < 2**52 else x // y for x in (a.low, a.high) for y in (b.low, b.high)
        ]
        return min(quotients), max(quotients)
    if operation == "arith.remsi" and b.low > 0 and a.low >= 0:
        return 0, min(a.high, b.high - 1)
    return None


def _most(a: Integer, b: Integer) -> float:
    """An upper limit of a product by what its factors are made of."""
    (kind, parts), (other, of_other) = a.operation, b.operation
    if a.low < 0 or b.low < 0:
        return float("inf")
    if kind == "arith.remsi" and other == "arith.divsi" and parts[1] is of_other[1]:
        return of_other[0].high  # x % n * (y // n) <= y
    if kind == "index":
        ending, of_ending = parts[1].operation
        if ending == "arith.divsi" and of_ending[1] is b:
            return of_ending[0].high  # i < y // n, so that i * n <= y
    return float("inf")

"""A step through the blocks: what of target and source a plan computes."""

from bench.diagrams.svg import Drawing
from stochca.plan import StepPlan

# A step that leaves blocks of the source out, and one that leaves rows of the target out.
TRUNCATED = (False, True, False, False, False, True, False, False, False)
CLASS_ROWS = (False, False, True, False, False, True, False, True, True)

LEFT, PITCH, WIDTH, HEIGHT = 84, 74, 58, 64
TARGET, SOURCE = 76, 206


def step(title: str, coins: tuple[bool, ...]) -> Drawing:
    """The blocks of both models in a step with these coins; the head reads the class token alone."""
    plan = StepPlan(coins)
    drawing = Drawing(LEFT + PITCH * len(coins) + 12, 416, title)
    drawing.text(16, 26, title, "bold")
    drawing.text(16, TARGET + 37, "target", "bold")
    drawing.text(16, SOURCE + 37, "source", "bold")
    drawing.text(16, 58, "coin", "small")
    for i, coin in enumerate(coins):
        x = LEFT + PITCH * i
        drawing.text(x + WIDTH / 2, 58, f"β = {int(coin)}", "middle small")
        _target(drawing, plan, i, x)
        _source(drawing, plan, i, x)
        if coin:
            middle = x + WIDTH / 2
            drawing.arrow([(middle, SOURCE - 2), (middle, TARGET + HEIGHT + 3)], "read")
            drawing.text(middle + 5, (SOURCE + TARGET + HEIGHT) / 2 + 4, "K₀, V₀", "small")
    _legend(drawing)
    return drawing


def _target(drawing: Drawing, plan: StepPlan, i: int, x: float) -> None:
    """A block of the target: all rows or, from the last one that reads its own tokens on, the class row."""
    few = i >= plan.first_class_row_block
    drawing.rectangle(x, TARGET, WIDTH, HEIGHT, "not" if few else "target")
    if few:
        drawing.rectangle(x, TARGET, WIDTH, 14, "target")
    lines = ("Q", "of source" if plan.coins[i] else "of tokens" if few else "K, V")
    for line, text in enumerate(lines):
        drawing.text(x + WIDTH / 2, TARGET + 34 + 17 * line, text, "middle small")
    if i + 1 < len(plan.coins):
        _next(drawing, x, TARGET)


def _source(drawing: Drawing, plan: StepPlan, i: int, x: float) -> None:
    """A block of the source: run, run as far as its keys and values, or not run."""
    if i >= plan.source_blocks:
        drawing.rectangle(x, SOURCE, WIDTH, HEIGHT, "not")
        drawing.text(x + WIDTH / 2, SOURCE + 37, "not run", "middle small")
        return
    advances = plan.advances_source(i)
    drawing.rectangle(x, SOURCE, WIDTH, HEIGHT, "source" if advances else "not")
    if not advances:
        drawing.rectangle(x, SOURCE, WIDTH, 24, "source")
        drawing.text(x + WIDTH / 2, SOURCE + 17, "K₀, V₀", "middle small")
        drawing.text(x + WIDTH / 2, SOURCE + 48, "not run", "middle small")
        return
    drawing.text(x + WIDTH / 2, SOURCE + 37, "block", "middle small")
    _next(drawing, x, SOURCE)


def _next(drawing: Drawing, x: float, y: float) -> None:
    drawing.arrow([(x + WIDTH, y + HEIGHT / 2), (x + PITCH - 1, y + HEIGHT / 2)])


def _legend(drawing: Drawing) -> None:
    rows = (
        (
            "target",
            "computed by the target; a low bar is the class row alone, which is all that the rest reads",
        ),
        (
            "source",
            "computed by the frozen source; of the last block that is read, the first norm and K₀, V₀",
        ),
        ("not", "read by nothing, and not computed"),
    )
    for line, (look, text) in enumerate(rows):
        y = 300 + 28 * line
        drawing.rectangle(LEFT, y, 30, 16, look)
        drawing.text(LEFT + 42, y + 13, text, "small")
    drawing.text(
        LEFT, 398, "Where β = 1 the target projects no K and V of its own, forward or backward.", "small"
    )

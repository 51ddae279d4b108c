"""What is measured: the name, unit and definition of each number, for tables, plots and report alike."""

from dataclasses import dataclass
from typing import Literal

Tokens = Literal["all tokens", "class token", "patches"]


@dataclass(frozen=True)
class Measure:
    """One number per image, block and head.

    Args:
        name: In files and in `Comparison.measured`.
        group: Of the plots, of which a row shares an axis.
        title: What is measured, in plots.
        quantity: What the axis shows.
        unit: Empty for a pure number.
        tokens: Over which it is averaged, or whose it is.
        definition: A sentence.
    """

    name: str
    group: str
    title: str
    quantity: str
    unit: str
    tokens: Tokens
    definition: str

    @property
    def axis(self) -> str:
        """The quantity with its unit."""
        return f"{self.quantity}, {self.unit}" if self.unit else self.quantity

    @property
    def label(self) -> str:
        """The measure in a table."""
        return f"{self.title}, {self.tokens} ({self.axis})"


SIMILARITY, CLASS_SIMILARITY, DIVERGENCE, DISTANCE = (
    "similarity",
    "class-similarity",
    "divergence",
    "distance",
)


def _cosine(part: str, plural: str, symbol: str, tokens: Tokens) -> Measure:
    of_class = tokens == "class token"
    of_tokens = "the class token" if of_class else "the same token, averaged over all tokens"
    return Measure(
        name=f"{'class_' * of_class}{part}_cosine",
        group=CLASS_SIMILARITY if of_class else SIMILARITY,
        title=plural,
        quantity="cosine similarity",
        unit="",
        tokens=tokens,
        definition=f"Cosine between the {symbol} of target and source of {of_tokens}: 1 in the same "
        "direction, 0 where they are orthogonal.",
    )


_PARTS = (("query", "queries", "q"), ("key", "keys", "k"), ("value", "values", "v"))

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        *(_cosine(*part, tokens="all tokens") for part in _PARTS),
        *(_cosine(*part, tokens="class token") for part in _PARTS),
        Measure(
            name="attention_divergence",
            group=DIVERGENCE,
            title="attention",
            quantity="divergence",
            unit="bits",
            tokens="all tokens",
            definition="Jensen-Shannon divergence between the attention of target and source, softmax(q k' · "
            "scale) of each one's own, averaged over the tokens that ask: 0 bits where both attend alike, 1 "
            "bit where they share no token.",
        ),
        Measure(
            name="class_attention_divergence",
            group=DIVERGENCE,
            title="attention to patches",
            quantity="divergence",
            unit="bits",
            tokens="class token",
            definition="The same of the class token alone, over the patches alone (their shares sum to 1).",
        ),
        *(
            Measure(
                name=f"attention_distance_{whose}",
                group=DISTANCE,
                title=f"reach of the {whose}",
                quantity="attention distance",
                unit="px",
                tokens="patches",
                definition=f"Distance in the image from a patch of the {whose} to the patches that it "
                "attends to, weighted by its attention among patches, averaged over the patches.",
            )
            for whose in ("target", "source")
        ),
    )
}

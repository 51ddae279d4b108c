"""Sizes of attention in the Vision Transformers that people fine-tune."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Size of the attention of one block.

    Args:
        model: What has it.
        batch: B.
        length: N, class token included.
        heads: H.
        head_dim: D.
    """

    model: str
    batch: int
    length: int
    heads: int
    head_dim: int = 64

    @property
    def name(self) -> str:
        """As in `B128-N197-H12-D64`."""
        return f"B{self.batch}-N{self.length}-H{self.heads}-D{self.head_dim}"

    @property
    def width(self) -> int:
        """C = H * D."""
        return self.heads * self.head_dim


VIT_B_224 = Shape("ViT-B/16 at 224", 128, 197, 12)
VIT_B_448 = Shape("ViT-B/16 at 448", 16, 785, 12)
VIT_L_14 = Shape("ViT-L/14 at 224", 64, 257, 16)
DINOV2_B = Shape("DINOv2 ViT-B/14 at 518", 16, 1370, 12)
MAIN = (VIT_B_224, VIT_B_448, VIT_L_14, DINOV2_B)
SHAPES = (
    *MAIN,
    Shape("ViT-B/16 at 224, small batch", 32, 197, 12),
    Shape("ViT-L/16 at 224", 64, 197, 16),
    Shape("ViT-S/16 at 224", 128, 197, 6),
    Shape("ViT-H/14 at 224", 32, 257, 16, 80),
)
TINY = Shape("none, for the CPU", 2, 20, 2, 16)
FLEX_SHAPES = (*MAIN, TINY)

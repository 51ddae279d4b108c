"""Segmentation with StochCA as the backbone, beside plain fine-tuning (p = 0) from the same weights.

python examples/segmentation.py                # generated discs and squares
"""

import torch
from common import DEVICE, VIT, flags, shapes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stochca import StochCA

NUM_CLASSES = 3


class Segmenter(nn.Module):
    """A linear head, which predicts all pixels of a patch from what four blocks know of it."""

    def __init__(self, backbone: StochCA) -> None:
        super().__init__()
        depth, (patch, _) = len(backbone.target.blocks), backbone.target.patch_embed.patch_size
        self.backbone, self.taken = backbone, [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        pixels = nn.Conv2d(4 * backbone.num_features, NUM_CLASSES * patch**2, kernel_size=1)
        self.head = nn.Sequential(pixels, nn.PixelShuffle(patch))

    def forward(self, images: Tensor) -> Tensor:
        """Scores `[B, NUM_CLASSES, H, W]`."""
        maps = self.backbone.forward_intermediates(images, self.taken, norm=True, intermediates_only=True)
        return self.head(torch.cat(maps, dim=1))


def mean_iou(predicted: Tensor, masks: Tensor) -> float:
    """Intersection over union in percent, averaged over the classes."""
    pairs = torch.bincount(NUM_CLASSES * masks.flatten() + predicted.flatten(), minlength=NUM_CLASSES**2)
    counts = pairs.view(NUM_CLASSES, NUM_CLASSES)
    return 100 * (counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())).mean().item()


args = flags(__doc__, **VIT, patch_size=8, p=0.3, steps=300, lr=5e-4)
sizes = {"img_size": args.img_size, "patch_size": args.patch_size}
images, masks = (t.to(DEVICE) for t in shapes(400, args.img_size))
for name, p in (("plain", 0.0), ("StochCA", args.p)):
    torch.manual_seed(0)
    backbone = StochCA.from_timm(args.model, pretrained=args.pretrained, p=p, num_classes=0, **sizes)
    model = Segmenter(backbone).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for rows in torch.randint(300, (args.steps, 16)):
        loss = cross_entropy(model(images[rows]), masks[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = model.eval()(images[300:]).argmax(dim=1)
    print(f"{name}: loss {loss:.3f}, mean IoU {mean_iou(predicted, masks[300:]):.1f} %")

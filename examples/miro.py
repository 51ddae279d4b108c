"""MIRO and StochCA from one pass of target and source: features are kept near those of the pretrained model.

python examples/miro.py
"""

import torch
from common import DEVICE, VIT, accuracy, digits, flags
from torch import nn
from torch.utils.data import DataLoader

from stochca import StochCA
from stochca.losses import MIRO
from stochca.objective import Objective

args = flags(__doc__, **VIT, p=0.1, weight=0.1, epochs=5, lr=1e-4)
train, test = digits(args.img_size)

model = StochCA.from_timm(
    args.model, pretrained=args.pretrained, p=args.p, num_classes=10, img_size=args.img_size
)
miro = MIRO(model, weight=args.weight)
objective = Objective(model, nn.CrossEntropyLoss(), [miro]).to(DEVICE)
groups = [{"params": model.parameters()}, {"params": miro.parameters(), "lr": args.lr * miro.lr_mult}]
optimizer = torch.optim.AdamW(groups, lr=args.lr)

for epoch in range(1, args.epochs + 1):
    objective.train()
    for images, labels in DataLoader(train, batch_size=50, shuffle=True):
        terms = objective(images.to(DEVICE), labels.to(DEVICE))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    shown = ", ".join(f"{name} {terms[name]:.3f}" for name in ("loss", "cross_entropy", "miro"))
    print(f"epoch {epoch}: {shown}, accuracy {accuracy(model, test):.1f} %")

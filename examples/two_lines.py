"""An ordinary timm training loop, patched in the two lines that are marked; without them it is plain.

python examples/two_lines.py

Evaluation is the plain target's, layer decay sees its layers, and `model.target` is what to save.
"""

import timm
import torch
from common import DEVICE, VIT, accuracy, digits, flags
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

from stochca import StochCA  # line one

args = flags(__doc__, **VIT, epochs=5, lr=1e-3)
train, test = digits(args.img_size)
loader = DataLoader(train, batch_size=50, shuffle=True)

model = timm.create_model(
    args.model, pretrained=args.pretrained, img_size=args.img_size, num_classes=10, drop_path_rate=0.1
).to(DEVICE)
model = StochCA(model, p=0.1)  # line two
optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05, layer_decay=0.75)
scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs * len(loader), warmup_t=10, t_in_epochs=False)
criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

step = 0
for epoch in range(1, args.epochs + 1):
    model.train()
    for images, labels in loader:
        scheduler.step_update(step := step + 1)
        loss = criterion(model(images.to(DEVICE)), labels.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
    print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy(model, test):.1f} %")

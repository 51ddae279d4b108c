"""Fine-tune a timm ViT with StochCA in a loop of your own, and save it as a plain timm model.

python examples/finetune_timm.py                # scikit-learn's digits, a minute on a CPU
python examples/finetune_timm.py --data-dir ~/birds --model vit_base_patch16_224 --img-size 224

~/birds holds train/CLASS/*.jpg and val/CLASS/*.jpg.
"""

import torch
from common import DEVICE, VIT, accuracy, digits, flags
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from stochca import StochCA

args = flags(__doc__, **VIT, data_dir="", p=0.1, epochs=5, lr=1e-4, output="finetuned.safetensors")
if args.data_dir:
    config = resolve_data_config({"img_size": args.img_size}, get_pretrained_cfg(args.model).to_dict())
    train = ImageFolder(f"{args.data_dir}/train", create_transform(**config, is_training=True))
    val = ImageFolder(f"{args.data_dir}/val", create_transform(**config))
    num_classes = len(train.classes)
else:
    train, val = digits(args.img_size)
    num_classes = 10

model = StochCA.from_timm(
    args.model, pretrained=args.pretrained, p=args.p, num_classes=num_classes, img_size=args.img_size
).to(DEVICE)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)  # of the target: the source is frozen

for epoch in range(1, args.epochs + 1):
    model.train()  # each step draws the coins of all blocks; in eval mode the target runs alone
    for images, labels in DataLoader(train, batch_size=50, shuffle=True):
        loss = cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy(model, val):.1f} %")

save_file(model.target.state_dict(), args.output)  # timm.create_model(..., checkpoint_path=args.output)

"""StochCA on several processes with torch's DistributedDataParallel.

torchrun --nproc_per_node 2 examples/ddp.py            # GPUs with NCCL, CPUs with gloo

Coins depend on seed and step alone: all processes have the same, and none waits for another's source.
"""

import torch
import torch.distributed as dist
from common import DEVICE, VIT, accuracy, digits, flags
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, DistributedSampler

from stochca import StochCA

args = flags(__doc__, **VIT, p=0.1, epochs=5, batch_size=25, lr=1e-3)
dist.init_process_group()
rank, world_size = dist.get_rank(), dist.get_world_size()
device = torch.device(DEVICE, dist.get_node_local_rank() if DEVICE == "cuda" else None)
if DEVICE == "cuda":
    torch.cuda.set_device(device)

torch.manual_seed(0)  # without pretrained weights the source, which DDP knows nothing of, is the same by this
model = StochCA.from_timm(
    args.model, pretrained=args.pretrained, p=args.p, num_classes=10, img_size=args.img_size
).to(device)
parallel = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
train, test = digits(args.img_size)
sampler = DistributedSampler(train)

for epoch in range(1, args.epochs + 1):
    sampler.set_epoch(epoch)
    parallel.train()
    for images, labels in DataLoader(train, args.batch_size, sampler=sampler):
        loss = cross_entropy(parallel(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dist.all_reduce(mean := loss.detach() / world_size)
    if rank == 0:
        print(f"epoch {epoch}: loss {mean:.3f}, accuracy {accuracy(model, test):.1f} %")

weights = parameters_to_vector(model.parameters()).detach()
dist.broadcast(first := weights.clone(), 0)
print(f"process {rank} of {world_size}: weights equal those of process 0: {torch.equal(weights, first)}")
dist.destroy_process_group()

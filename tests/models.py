"""Small models and images that the tests share."""

import timm
import torch

from stochca import StochCA


def make_target(name="vit_tiny_patch16_224", dtype=torch.float64, **kwargs):
    """A small instance of a timm model, with weights far enough from their initialisation to matter."""
    torch.manual_seed(0)
    small = {"img_size": 24, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    target = timm.create_model(name, **{**small, **kwargs}).to(dtype)
    perturb(target)
    return target


def perturb(model, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))


def make_model(name="vit_tiny_patch16_224", dtype=torch.float64, p=0.5, stochca=None, **kwargs):
    """StochCA whose source differs from its target, as after some training."""
    model = StochCA(make_target(name, dtype, **kwargs), p=p, **(stochca or {}))
    perturb(model.target, seed=1)
    return model.train()


def make_images(batch=2, dtype=torch.float64, size=24, seed=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)

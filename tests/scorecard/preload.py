"""What the server of `children.py` imports once, for all the processes that it forks."""

import timm  # noqa: F401
import torch

import stochca.cli
import stochca.train  # noqa: F401

torch.set_num_threads(1)

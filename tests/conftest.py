import os

import torch

# Kernels are interpreted where there is no GPU. Triton reads this when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# One thread for each of the test processes: more only get in each other's way.
torch.set_num_threads(1)

import os
from importlib.util import find_spec

import torch

# Kernels are interpreted where there is no GPU. Triton reads this when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        from tests.interpreter import patch_modules_once

        patch_modules_once()

# One thread for each of the test processes: more only get in each other's way.
torch.set_num_threads(1)

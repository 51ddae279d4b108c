"""What says which files a step runs names all of them: by it results are known to be stale."""

import subprocess
import sys

from bench.environment import METHOD

STEP = """
import sys, timm, torch
from stochca import StochCA
model = StochCA.from_timm("vit_tiny_patch16_224", pretrained=False, depth=2, p=0.5).train()
model(torch.randn(1, 3, 224, 224)).sum().backward()
model.compile()
print(*(name for name in sys.modules if name.partition(".")[0] == "stochca" and "." in name))
"""


def test_a_step_imports_no_file_that_is_not_named():
    said = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True).stdout
    files = {f"{name.replace('.', '/')}.py" for name in said.split()}
    assert len(files) > 5
    assert files <= set(METHOD)

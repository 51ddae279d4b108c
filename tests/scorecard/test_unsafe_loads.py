import textwrap

import pytest

from tests.scorecard.unsafe_loads import findings, unsafe_loads

PLANTED = [
    "import torch; torch.load('a.pt')",
    "import torch; torch.load('a.pt', weights_only=False)",
    "import torch; torch.load('a.pt', weights_only=flag)",
    "import torch as t; t.load('a.pt')",
    "from torch import load; load('a.pt')",
    "from torch import load as read; read('a.pt')",
    "from timm.models import load_state_dict; load_state_dict('a.pt')",
    "import torch; torch.jit.load('a.pt')",
    "import torch; torch.hub.load_state_dict_from_url('https://...')",
    "import pickle; pickle.load(file)",
    "from pickle import loads; loads(text)",
    "import pickle; list(map(pickle.loads, texts))",
    "import pickle; pickle.Unpickler(file).load()",
    "import marshal; marshal.loads(text)",
    "import shelve; shelve.open('a')",
    "import dill; dill.load(file)",
    "import joblib; joblib.load('a')",
    "import yaml; yaml.load(text)",
    "import yaml; yaml.load(text, yaml.Loader)",
    "import yaml; yaml.load(text, Loader=yaml.UnsafeLoader)",
    "import yaml; yaml.unsafe_load(text)",
    "eval('1 + 1')",
    "exec('import os')",
    "import builtins; builtins.exec('import os')",
    "import numpy as np; np.load('a.npy', allow_pickle=True)",
    "import subprocess; subprocess.run('ls', shell=True)",
    "import subprocess; subprocess.run('ls', shell=flag)",
    "import os; os.system('ls')",
    "from datasets import load_dataset; load_dataset('a', trust_remote_code=True)",
    "def f():\n    class A:\n        x = [eval(c) for c in 'ab']",
]
CLEAN = """
    import numpy as np, subprocess, torch, yaml, pickle
    from safetensors.torch import load_file
    torch.load("a.pt", weights_only=True)
    torch.load("a.pt", map_location="cpu", weights_only=True, mmap=True)
    yaml.safe_load(text); yaml.load(text, Loader=yaml.SafeLoader)
    np.load("a.npy"); np.load("a.npy", allow_pickle=False)
    subprocess.run(["ls"]); subprocess.run(["ls"], shell=False)
    load_file("a.safetensors"); model.eval(); pickle.UnpicklingError; model.load(); re.compile("a")
"""


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_load_is_found(source: str):
    assert findings(source)


def test_what_is_safe_is_not_found():
    assert findings(textwrap.dedent(CLEAN)) == []


def test_a_finding_tells_the_file_and_the_line(tmp_path):
    (tmp_path / "module.py").write_text("import torch\n\n\ntorch.load('a.pt')\n")
    assert unsafe_loads([tmp_path]) == [f"{tmp_path / 'module.py'}:4: torch.load without weights_only=True"]

"""A process that has imported what tests import, and forks a child for each run of pytest.

Importing torch and timm takes longer than most tests. This file is run as a script, so that nothing of the
tree that it lies in is loaded: a child imports stochca, stochca_kernels, bench and tests from the copy that
it is given. The arguments are the modules to import first.

It reads a line of JSON per run, `folder`, `arguments` and `limit` in seconds of processor time, and answers
with one: `code`, None where the limit ended it, `output` and `seconds`, of processor time as well.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path


def serve() -> None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


def run(folder: str, arguments: list[str], limit: float) -> dict:
    """Run pytest in a child, in a folder; nothing that it started is left behind."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            _become_pytest(folder, arguments, limit, output.fileno())
        code = _wait(child, limit)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        output.seek(0)
        return {"code": code, "output": output.read(), "seconds": seconds}


def _become_pytest(folder: str, arguments: list[str], limit: float, output: int) -> None:
    code = 3
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.path.insert(0, folder)
        # Processes that a test starts import the copy as well, whatever is installed.
        os.environ["PYTHONPATH"] = folder
        import pytest

        code = int(pytest.main(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, limit: float) -> int | None:
    """The exit code of a child, minus the signal that ended it, or None where it went on for too long.

    One that waits for ever uses no processor time: it has ten times as long by the clock.
    """
    deadline = time.monotonic() + 10 * limit
    pause = 0.01
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    own = Path(__file__).parent
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() not in (own, *own.parents)]
    serve()

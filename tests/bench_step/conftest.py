import pytest

from bench.step import rate
from bench.step.stage import Stage
from bench.step.workloads import TINY, Setting
from tests.bench_step.common import CPU


@pytest.fixture(autouse=True, scope="module")
def _small_products():
    """What the machine reaches is measured by a few small products: any rate will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate, "CPU_SIDE", 64)
        patch.setattr(rate, "ROUNDS", 2)
        yield


@pytest.fixture(scope="module")
def setting():
    return Setting.make(TINY, CPU)


@pytest.fixture
def tiny():
    return Stage(TINY, CPU)

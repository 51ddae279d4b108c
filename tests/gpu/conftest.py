import pytest

from tests.gpu import paths


@pytest.fixture
def poisoned():
    """Everything that the launchers allocate is NaN until a kernel writes it."""
    with paths.poisoned():
        yield

import pytest
import torch


@pytest.fixture
def compiler():
    """torch's compiler, as after the start of a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

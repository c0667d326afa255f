import pytest
import torch


@pytest.fixture(autouse=True)
def _fill_empty_with_nan():
    """What a kernel leaves unwritten shows: torch.empty comes filled with NaN."""
    previous = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous)
    torch.utils.deterministic.fill_uninitialized_memory = filling

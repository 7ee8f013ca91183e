import math

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
def poison(request):
    """A value that padding may hold without any effect."""
    return request.param

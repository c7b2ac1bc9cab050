"""Fixtures and the Hypothesis profile of the suite."""

import pytest
from helpers.common import ISAS, using
from hypothesis import settings

# No deadline: a shared machine stalls now and then, which says nothing about the code.
settings.register_profile("dynquant", deadline=None, max_examples=60)
settings.load_profile("dynquant")


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test once with the kernels of each instruction set that is built and supported."""
    with using(request.param):
        yield request.param

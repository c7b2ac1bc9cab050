"""Fixtures and the Hypothesis profile of the suite."""

import os

import pytest
from helpers.common import ISAS, using
from hypothesis import settings

from dynquant import _core

# No deadline: a shared machine stalls now and then, which says nothing about the code.
settings.register_profile("dynquant", deadline=None, max_examples=60)
settings.load_profile("dynquant")

FORCED = os.environ.get("DYNQUANT_ISA")


@pytest.fixture(params=[FORCED] if FORCED else ISAS)
def isa(request):
    """Run the test with each instruction set that is built and supported, or with ``DYNQUANT_ISA`` alone."""
    with using(request.param):
        yield request.param


@pytest.fixture(params=["pool", "python"])
def shared(request):
    """Run the test with work shared, however small, by the pool of threads; and by threads of Python."""
    _core.set_sharing(True, request.param == "python")
    yield
    _core.set_sharing(False, False)

"""Error-compensated rounding: what calibration is worth, and that it never costs."""

import numpy as np
import pytest
from common import block_layer, output_sqnr
from hypothesis import given
from hypothesis import strategies as st

import dynquant
from dynquant import QuantLinear, quantize_weights

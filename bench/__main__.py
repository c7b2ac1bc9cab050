"""`python -m bench`: the same as `python bench/run.py`."""

import sys
from pathlib import Path

# This folder instead of the checkout, whose source folder dynquant would hide the installed one.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parent))

from run import main

sys.exit(main())

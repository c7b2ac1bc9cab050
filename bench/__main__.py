"""`python -m bench`."""

import sys

# The checkout: its source folder dynquant would hide the installed one. PYTHONPATH=. puts it there again.
if not getattr(sys.flags, "safe_path", False):
    sys.path.pop(0)

from bench.cli import main

sys.exit(main())

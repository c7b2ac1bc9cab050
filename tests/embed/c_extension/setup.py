# The header comes from the installed package; there is nothing to link.
from setuptools import Extension, setup

import dynquant

setup(
    name="byte_rows",
    ext_modules=[Extension("byte_rows", ["byte_rows.c"], include_dirs=[dynquant.get_include()])],
)

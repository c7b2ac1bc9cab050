# cimport finds dynquant/capi.pxd in the installed package; there is nothing to include and nothing to link.
from Cython.Build import cythonize
from setuptools import setup

setup(name="key_cache", ext_modules=cythonize("key_cache.pyx"))

"""Where C and C++ programs find the header."""

from __future__ import annotations

import os


def get_include() -> str:
    """Folder of ``dynquant.h``, for the compiler of a C or C++ program that calls the kernels.

    Returns
    -------
    str

    Notes
    -----
    The header has ``dynquant_import()``, which returns a table of functions on plain pointers that need no
    GIL; there is nothing to link with. Cython needs no header: ``from dynquant.capi cimport ...``.

    Examples
    --------
    >>> import os
    >>> os.listdir(get_include())
    ['dynquant.h']
    """
    return os.path.join(os.path.dirname(__file__), "include")

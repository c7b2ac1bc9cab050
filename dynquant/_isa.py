"""Picks the instruction set whose row kernels are used; once, while the package is imported."""

from __future__ import annotations

import os
import sys
from typing import TypedDict

from . import _core
from .errors import IsaError

_VARIABLE = "DYNQUANT_ISA"


class SimdInfo(TypedDict):
    selected: str
    built: tuple[str, ...]
    supported: tuple[str, ...]


_selected = ""
# What is used instead where the system refuses the registers of AMX.
_weaker = ""


def _table(isa: str) -> object:
    # Literal imports, so that freezers see them. A module compiled for an instruction set is imported only
    # after its check: even its initialization may use that set.
    if isa == "amx":
        from ._isa_amx import table  # type: ignore[import-not-found, unused-ignore]
    elif isa == "avx512vnni":
        from ._isa_avx512vnni import table  # type: ignore[import-not-found, unused-ignore]
    elif isa == "avx512":
        from ._isa_avx512 import table  # type: ignore[import-not-found, unused-ignore]
    elif isa == "avxvnni":
        from ._isa_avxvnni import table  # type: ignore[import-not-found, unused-ignore]
    elif isa == "avx2":
        from ._isa_avx2 import table  # type: ignore[import-not-found, unused-ignore]
    elif isa == "i8mm":
        from ._isa_i8mm import table  # type: ignore[import-not-found, unused-ignore]
    elif isa == "dotprod":
        from ._isa_dotprod import table  # type: ignore[import-not-found, unused-ignore]
    else:
        from ._isa_baseline import table  # type: ignore[import-not-found, unused-ignore]
    return table


def select(isa: str | None = None) -> None:
    """Use the kernels of `isa`, or of the best instruction set built and supported.

    Raises
    ------
    IsaError
        If `isa` is not the name of one that this build has and this CPU and operating system run.
    """
    global _selected, _weaker
    built, supported = _core.isas_built(), _core.isas_supported()
    refused = isa == "amx" and "amx" in supported and not _core.permit_amx()
    if refused:
        supported = supported[:-1]
    usable = [name for name in built if name in supported]
    if isa is not None and isa not in usable:
        raise IsaError(
            f"{_VARIABLE}={isa!r} is not available: this build has {', '.join(built)}; "
            f"this CPU and operating system run {', '.join(supported)}"
            + "; Linux refuses AMX, as where the stack of a signal handler is too small for it"
            * refused
        )
    # On the cores of Apple SMMLA is no faster than SDOT, and takes more instructions around it.
    if isa is None and usable[-1] == "i8mm" and sys.platform == "darwin":
        usable = usable[:-1]
    _selected, _weaker = isa or usable[-1], ""
    if isa is None and _selected == "amx":
        _weaker = usable[-2]
    _core.set_table(_table(_selected), _table(_weaker) if _weaker else None)


def simd_info() -> SimdInfo:
    """Tell which instruction set the kernels use.

    Returns
    -------
    dict
        ``selected``, the name of the one in use; ``built``, the names that this build has; ``supported``,
        the names that this CPU and operating system run. The names are, weakest first, ``"baseline"``; on
        x86-64 ``"avx2"`` (x86-64-v3), ``"avxvnni"`` (the same with AVX-VNNI), ``"avx512"`` (x86-64-v4),
        ``"avx512vnni"`` and ``"amx"`` (AVX512-VNNI and AMX-INT8); on 64-bit ARM, where the baseline has NEON,
        ``"dotprod"`` (Armv8.2 with SDOT) and ``"i8mm"`` (the same with SMMLA).

    Notes
    -----
    The best one in both lists is selected when dynquant is imported; on macOS ``"dotprod"`` rather than
    ``"i8mm"``, which is no faster on the processors of Apple. The environment variable
    ``DYNQUANT_ISA``, set before that, selects one by name, and importing dynquant raises `IsaError` when it
    is not available. Results do not depend on the choice in any bit.

    Linux has to permit the registers of AMX to the process. dynquant asks for them when the first weights are
    packed (with ``DYNQUANT_ISA=amx``, when it is imported). Linux refuses where the alternate stack of a
    signal handler is smaller than ``getauxval(AT_MINSIGSTKSZ)``, some 12 KB; ``"amx"`` is then not among the
    supported ones, and the next weaker set is selected. Once they are permitted, ``sigaltstack`` fails with
    ENOMEM for such a stack.
    """
    selected, supported = _selected, _core.isas_supported()
    if _core.amx_refused():
        selected, supported = _weaker, tuple(name for name in supported if name != "amx")
    return {"selected": selected, "built": _core.isas_built(), "supported": supported}


select(os.environ.get(_VARIABLE) or None)

"""What several test files share.

* `common`: instruction sets, bitwise comparison, inputs worth trying
* `reference`: what every public function computes, in slow and obvious NumPy
* `calls`: one call of everything public, for tests that repeat it
* `capi`: the functions of the C table, called from Python
* `programs`: compiling and running other programs against the installed package
* `out_of_memory.py`, `failing_malloc.c`: the program of `test_allocation.py`
"""

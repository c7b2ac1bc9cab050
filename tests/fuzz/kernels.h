/* The functions that libFuzzer or replay.c calls. */
#ifndef DQ_FUZZ_KERNELS_H
#define DQ_FUZZ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif

/* Runs kernels.c without libFuzzer: on every line of the given files, an input in hexadecimal, and then on as many
   random inputs as the first argument says. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { MAX_SIZE = 512 };

static long lines_of(const char *path) {
    char line[2 * MAX_SIZE + 2];
    long count = 0;
    FILE *file = fopen(path, "r");
    if (file == NULL) exit(2);
    for (; fgets(line, sizeof line, file) != NULL; count++) {
        uint8_t input[MAX_SIZE];
        unsigned byte;
        size_t size = 0;
        while (sscanf(line + 2 * size, "%2x", &byte) == 1) input[size++] = (uint8_t)byte;
        LLVMFuzzerTestOneInput(input, size);
    }
    fclose(file);
    return count;
}

int main(int argc, char **argv) {
    long count = 0, random = argc > 1 ? atol(argv[1]) : 0;
    uint8_t input[96];
    LLVMFuzzerInitialize(&argc, &argv);
    for (int i = 2; i < argc; i++) count += lines_of(argv[i]);
    srand(1);
    for (; random--; count++) {
        const size_t size = (size_t)rand() % (sizeof input + 1);
        for (size_t i = 0; i < size; i++) input[i] = (uint8_t)(rand() >> 7);
        LLVMFuzzerTestOneInput(input, size);
    }
    printf("%ld inputs\n", count);
    return 0;
}

/* The one kernel that is run: PyTorch's fill of a contiguous tensor (`torch.zeros_like`, `ones`, `full`, `fill_`).
 *
 * Masks, scales and flags that programs make so are what they should be. Kernels and their arguments are those of
 * aten/src/ATen/native/cuda/CUDALoops.cuh and FillKernel.cu: the number of elements, the functor, which is the value,
 * and the address.
 */
#include "runtime.h"

#include <string.h>

static const struct { const char *mangled; int width; } types[] = {
    {"b", 1}, {"a", 1}, {"h", 1}, {"s", 2}, {"t", 2}, {"i", 4}, {"j", 4}, {"l", 8}, {"m", 8}, {"f", 4}, {"d", 8},
    {"N3c104HalfE", 2}, {"N3c108BFloat16E", 2}, {"N3c107complexIfEE", 8},
};

int fill_width(const char *kernel) {
    static const char functor[] = "NS0_11FillFunctorI", one_address[] = "EESt5arrayIPcLm1EE";
    const char *type = strstr(kernel, functor);
    if (!type || !strstr(kernel, "29vectorized_elementwise_kernelI")) return 0;
    type += sizeof functor - 1;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        size_t length = strlen(types[i].mangled);
        if (!strncmp(type, types[i].mangled, length) && !strncmp(type + length, one_address, sizeof one_address - 1))
            return types[i].width;
    }
    return 0;
}

void fill(int width, void **arguments) {
    int count = *(int *)arguments[0];
    if (count > 0) card_memory_set(*(void **)arguments[2], arguments[1], width, (size_t)count);
}

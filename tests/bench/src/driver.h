/* What the parts of the simulated driver (libcuda.so.1) share: the public functions that PyTorch and
 * Triton call. What is not here is not found, or says "not supported". */
#ifndef DRIVER_H
#define DRIVER_H

#include "card.h"

#define HIDDEN __attribute__((visibility("hidden")))
#define API __attribute__((visibility("default"))) CUresult CUDAAPI

HIDDEN CUresult error_of(MemoryResult result);
HIDDEN CUcontext context_of(int device);

#endif

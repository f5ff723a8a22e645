/* What the parts of the simulated CUDA runtime (libcudart.so.13) share. */
#ifndef RUNTIME_H
#define RUNTIME_H

#include "card.h"

#include <cuda_runtime_api.h>

#define HIDDEN __attribute__((visibility("hidden")))
#define API __attribute__((visibility("default"))) cudaError_t CUDARTAPI

struct CUstream_st {
    int device;
    unsigned flags;
    int priority;
    bool capturing;
    unsigned long long capture_id;
    cudaGraph_t graph;
};

/* Remember an error as this thread's last one, and return it. */
HIDDEN cudaError_t result_of(cudaError_t error);
HIDDEN cudaError_t error_of(MemoryResult result);
/* Open the context of this thread's device. */
HIDDEN cudaError_t open_context(void);
/* The stream that a handle means; the default stream of this thread's device for 0, cudaStreamLegacy and
 * cudaStreamPerThread. */
HIDDEN struct CUstream_st *stream_of(cudaStream_t stream);

/* Of a kernel that fills a contiguous tensor: the bytes of an element; 0 of any other kernel. */
HIDDEN int fill_width(const char *kernel);
HIDDEN void fill(int width, void **arguments);

#endif

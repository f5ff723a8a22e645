/* The simulated CUDA runtime: memory, copies, pools, what a pointer is. */
#include "runtime.h"

#include <string.h>

/* ---- allocation ---- */

API cudaMalloc(void **pointer, size_t size) {
    *pointer = NULL;
    cudaError_t error = open_context();
    if (error || !size) return error;
    MemoryResult result = card_memory_allocate(size, MEM_DEVICE, 0, pointer);
    TRACE("cudaMalloc %zu -> %p (%d)", size, *pointer, (int)result);
    return error_of(result);
}
API cudaFree(void *pointer) {
    if (!pointer) return open_context();
    TRACE("cudaFree %p", pointer);
    return error_of(card_memory_free(pointer, false));
}
API cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    *pointer = NULL;
    cudaError_t error = open_context();
    if (error || !size) return error;
    TRACE("cudaHostAlloc %zu flags %u", size, flags);
    return error_of(card_memory_allocate(size, MEM_HOST, flags, pointer));
}
API cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }
API cudaFreeHost(void *pointer) { return pointer ? error_of(card_memory_free(pointer, true)) : cudaSuccess; }
API cudaHostRegister(void *pointer, size_t size, unsigned flags) {
    return error_of(card_memory_register(pointer, size, flags));
}
API cudaHostUnregister(void *pointer) {
    return card_memory_unregister(pointer) ? result_of(cudaErrorHostMemoryNotRegistered) : cudaSuccess;
}
API cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    (void)flags;
    *device = host;
    return cudaSuccess;
}
API cudaMemGetInfo(size_t *available, size_t *total) {
    cudaError_t error = open_context();
    if (error) return error;
    size_t used = card_usage_total(card_behind(card_current()));
    *total = card_gpu()->capacity;
    *available = used < *total ? *total - used : 0;
    return cudaSuccess;
}

/* ---- copies: done when the call returns, on the stream or not ---- */

API cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream;
    TRACE("cudaMemcpyAsync %zu bytes %p <- %p, kind %d", size, to, from, (int)kind);
    cudaError_t error = open_context();
    return error ? error : error_of(card_memory_copy(to, from, size));
}
API cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, size, kind, NULL);
}
API cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size, cudaStream_t stream) {
    (void)to_device, (void)from_device;
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}
API cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                      enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++) {
        cudaError_t error =
            cudaMemcpyAsync((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind, stream);
        if (error) return error;
    }
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
API cudaMemcpyBatchAsync(void *const *to, const void *const *from, const size_t *sizes, size_t count,
                         struct cudaMemcpyAttributes *attributes, size_t *indices, size_t number, cudaStream_t stream) {
    (void)attributes, (void)indices, (void)number;
    for (size_t i = 0; i < count; i++) {
        cudaError_t error = cudaMemcpyAsync(to[i], from[i], sizes[i], cudaMemcpyDefault, stream);
        if (error) return error;
    }
    return cudaSuccess;
}
#endif
API cudaMemsetAsync(void *pointer, int value, size_t count, cudaStream_t stream) {
    (void)stream;
    TRACE("cudaMemsetAsync %p %zu bytes", pointer, count);
    cudaError_t error = open_context();
    return error ? error : error_of(card_memory_set(pointer, (unsigned char)value, 1, count));
}
API cudaMemset(void *pointer, int value, size_t count) { return cudaMemsetAsync(pointer, value, count, NULL); }

/* ---- stream-ordered pools: plain allocations ---- */

static int the_pool;

API cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    (void)device;
    *pool = (cudaMemPool_t)&the_pool;
    return cudaSuccess;
}
API cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) {
    (void)stream;
    return cudaMalloc(pointer, size);
}
API cudaFreeAsync(void *pointer, cudaStream_t stream) {
    (void)stream;
    return cudaFree(pointer);
}
API cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    (void)pool, (void)attribute, (void)value;
    return cudaSuccess;
}
API cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    (void)pool;
    if (attribute >= cudaMemPoolAttrReleaseThreshold) *(unsigned long long *)value = 0;
    else *(int *)value = 0;
    return cudaSuccess;
}
API cudaMemPoolSetAccess(cudaMemPool_t pool, const struct cudaMemAccessDesc *access, size_t count) {
    (void)pool, (void)access, (void)count;
    return cudaSuccess;
}
API cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep) {
    (void)pool, (void)keep;
    return cudaSuccess;
}
API cudaDeviceGetGraphMemAttribute(int device, enum cudaGraphMemAttributeType attribute, void *value) {
    (void)device, (void)attribute;
    *(unsigned long long *)value = 0;
    return cudaSuccess;
}
API cudaDeviceSetGraphMemAttribute(int device, enum cudaGraphMemAttributeType attribute, void *value) {
    (void)device, (void)attribute, (void)value;
    return cudaSuccess;
}

/* ---- what a pointer is ---- */

API cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    Block block;
    memset(attributes, 0, sizeof *attributes);
    attributes->device = cudaInvalidDeviceId;
    attributes->type = cudaMemoryTypeUnregistered;
    if (!card_memory_find(pointer, &block)) return cudaSuccess;
    bool host = block.kind == MEM_HOST || block.kind == MEM_REGISTERED;
    attributes->device = block.device;
    attributes->type = host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->devicePointer = (void *)(uintptr_t)pointer;
    attributes->hostPointer = host ? attributes->devicePointer : NULL;
    return cudaSuccess;
}

/* ---- memory of other processes: none ---- */

API cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) {
    (void)handle, (void)pointer;
    return result_of(cudaErrorNotSupported);
}
API cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t handle, unsigned flags) {
    (void)pointer, (void)handle, (void)flags;
    return result_of(cudaErrorNotSupported);
}
API cudaIpcCloseMemHandle(void *pointer) {
    (void)pointer;
    return result_of(cudaErrorNotSupported);
}
API cudaIpcGetEventHandle(cudaIpcEventHandle_t *handle, cudaEvent_t event) {
    (void)handle, (void)event;
    return result_of(cudaErrorNotSupported);
}
API cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t handle) {
    (void)event, (void)handle;
    return result_of(cudaErrorNotSupported);
}

/* The simulated libcuda.so.1: the public driver functions that PyTorch itself calls.
 *
 * Virtual memory for expandable segments, contexts, and modules of code compiled at run time
 * (jiterator, NVRTC), whose launches do nothing. What is not here is not found.
 */
#include "card.h"

#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default"))) CUresult CUDAAPI
extern const struct { int code; const char *name; } driver_error_names[]; /* generated */

/* The primary context of a device is the address of its place here. */
static char contexts[MAX_CARDS];
static CUcontext context_of(int device) { return (CUcontext)&contexts[device]; }
static int device_of(CUcontext context) { return (int)((char *)context - contexts); }

static CUresult error_of(MemoryResult result) {
    static const CUresult errors[] = {
        [MEMORY_OK] = CUDA_SUCCESS,
        [MEMORY_FULL] = CUDA_ERROR_OUT_OF_MEMORY,
        [MEMORY_INVALID] = CUDA_ERROR_INVALID_VALUE,
        [MEMORY_KNOWN] = CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
        [MEMORY_DEAD] = CUDA_ERROR_NOT_INITIALIZED,
    };
    return errors[result];
}

API cuGetErrorName(CUresult error, const char **text) {
    *text = NULL;
    for (size_t i = 0; driver_error_names[i].name; i++)
        if (driver_error_names[i].code == (int)error) *text = driver_error_names[i].name;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API cuGetErrorString(CUresult error, const char **text) {
    if (error != CUDA_ERROR_OUT_OF_MEMORY) return cuGetErrorName(error, text);
    *text = "out of memory";
    return CUDA_SUCCESS;
}

/* ---- device and context ---- */

API cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
API cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}
API cuDeviceGetCount(int *count) {
    *count = card_visible_count();
    return CUDA_SUCCESS;
}
API cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return card_behind(ordinal) < 0 ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
API cuDeviceGetName(char *name, int length, CUdevice device) {
    (void)device;
    snprintf(name, (size_t)length, "%s", card_gpu()->name);
    return CUDA_SUCCESS;
}
API cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    card_uuid(card_behind(device), (unsigned char *)uuid->bytes);
    return CUDA_SUCCESS;
}
API cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    (void)device;
    *bytes = card_gpu()->capacity;
    return CUDA_SUCCESS;
}
API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    if (card_behind(device) < 0) return CUDA_ERROR_INVALID_DEVICE;
    if (!card_attribute(card_behind(device), (int)attribute, value))
        WARN("device attribute %d is not known: 0", (int)attribute);
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = card_context_is_open(device);
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = context_of(device);
    return error_of(card_context_open(device));
}
API cuDevicePrimaryCtxRelease_v2(CUdevice device) { return (void)device, CUDA_SUCCESS; }
API cuCtxGetCurrent(CUcontext *context) {
    *context = card_context_is_open(card_current()) ? context_of(card_current()) : NULL;
    return CUDA_SUCCESS;
}
API cuCtxSetCurrent(CUcontext context) {
    if (context) card_make_current(device_of(context));
    return CUDA_SUCCESS;
}

/* Contexts below the current one. */
static __thread int pushed[16];
static __thread int depth;
API cuCtxPushCurrent_v2(CUcontext context) {
    if (depth == 16) return CUDA_ERROR_INVALID_VALUE;
    pushed[depth++] = card_current();
    return cuCtxSetCurrent(context);
}
API cuCtxPopCurrent_v2(CUcontext *context) {
    if (context) cuCtxGetCurrent(context);
    if (depth) card_make_current(pushed[--depth]);
    return CUDA_SUCCESS;
}
API cuCtxGetDevice(CUdevice *device) {
    *device = card_current();
    return CUDA_SUCCESS;
}
API cuCtxSynchronize(void) { return CUDA_SUCCESS; }

/* ---- memory ---- */

API cuMemGetInfo_v2(size_t *available, size_t *total) {
    size_t used = card_usage_total(card_behind(card_current()));
    *total = card_gpu()->capacity;
    *available = used < *total ? *total - used : 0;
    return CUDA_SUCCESS;
}
API cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr pointer) {
    Block block;
    if (!card_memory_find((void *)pointer, &block)) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = block.base;
    if (size) *size = block.size;
    return CUDA_SUCCESS;
}
API cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    Block block;
    if (!card_memory_find((void *)pointer, &block)) return CUDA_ERROR_INVALID_VALUE;
    bool host = block.kind == MEM_HOST || block.kind == MEM_REGISTERED;
    switch ((int)attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)data = context_of(block.device); break;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *(unsigned *)data = host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
            break;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)data = pointer; break;
        case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long *)data = block.id; break;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)data = 0; break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)data = block.device; break;
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(uintptr_t *)data = block.base; break;
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)data = block.size; break;
        default: WARN("pointer attribute %d", (int)attribute); return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}
API cuMemsetD32Async(CUdeviceptr pointer, unsigned value, size_t count, CUstream stream) {
    (void)stream;
    return error_of(card_memory_set((void *)pointer, value, 4, count));
}
API cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr pointer, cuuint32_t value, unsigned flags) {
    (void)stream, (void)flags;
    return error_of(card_memory_set((void *)pointer, value, 4, 1));
}

API cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *properties,
                                  CUmemAllocationGranularity_flags option) {
    (void)properties, (void)option;
    *granularity = PAGE;
    return CUDA_SUCCESS;
}
API cuMemAddressReserve(CUdeviceptr *pointer, size_t size, size_t alignment, CUdeviceptr wish,
                        unsigned long long flags) {
    (void)alignment, (void)wish, (void)flags;
    void *at = NULL;
    MemoryResult result = card_space_reserve(size, &at);
    *pointer = (CUdeviceptr)at;
    TRACE("cuMemAddressReserve %zu -> %p", size, at);
    return error_of(result);
}
API cuMemAddressFree(CUdeviceptr pointer, size_t size) { return error_of(card_space_free((void *)pointer, size)); }
API cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties,
                unsigned long long flags) {
    (void)flags;
    Physical *physical = NULL;
    int device = properties->location.id;
    CUresult result = error_of(card_context_open(device));
    if (!result) result = error_of(card_physical_create(device, size, &physical));
    *handle = (CUmemGenericAllocationHandle)(uintptr_t)physical;
    TRACE("cuMemCreate %zu (%d)", size, (int)result);
    return result;
}
API cuMemRelease(CUmemGenericAllocationHandle handle) {
    card_physical_release((Physical *)(uintptr_t)handle);
    return CUDA_SUCCESS;
}
API cuMemMap(CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
             unsigned long long flags) {
    (void)offset, (void)flags;
    TRACE("cuMemMap %p %zu", (void *)pointer, size);
    return error_of(card_space_map((void *)pointer, size, (Physical *)(uintptr_t)handle));
}
API cuMemUnmap(CUdeviceptr pointer, size_t size) {
    TRACE("cuMemUnmap %p %zu", (void *)pointer, size);
    return error_of(card_space_unmap((void *)pointer, size));
}
API cuMemSetAccess(CUdeviceptr pointer, size_t size, const CUmemAccessDesc *access, size_t count) {
    (void)access, (void)count;
    return error_of(card_space_open((void *)pointer, size));
}
API cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *pointer) {
    Physical *physical = card_physical_at(pointer);
    *handle = (CUmemGenericAllocationHandle)(uintptr_t)physical;
    return physical ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* ---- code compiled at run time: accepted, never run ---- */

API cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    (void)image, (void)count, (void)options, (void)values;
    *module = malloc(1);
    return error_of(card_context_open(card_current()));
}
API cuModuleLoadData(CUmodule *module, const void *image) { return cuModuleLoadDataEx(module, image, 0, NULL, NULL); }
API cuModuleLoad(CUmodule *module, const char *file) { return cuModuleLoadData(module, file); }
API cuModuleUnload(CUmodule module) {
    free(module);
    return CUDA_SUCCESS;
}
API cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    (void)module;
    TRACE("cuModuleGetFunction %s", name);
    *function = malloc(1); /* never freed: PyTorch keeps them */
    return CUDA_SUCCESS;
}
API cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    (void)function;
    switch ((int)attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = (int)(card_gpu()->major * 10 + card_gpu()->minor); break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}
API cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    (void)function, (void)attribute, (void)value;
    return CUDA_SUCCESS;
}
API cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    (void)function, (void)config;
    return CUDA_SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    (void)function;
    *blocks = card_occupancy(threads, shared, 32);
    return CUDA_SUCCESS;
}
API cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, CUstream stream, void **arguments, void **extra) {
    (void)function, (void)shared, (void)stream, (void)arguments, (void)extra;
    return gx && gy && gz && bx && by && bz ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                              unsigned bz, unsigned shared, CUstream stream, void **arguments) {
    return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, NULL);
}
API cuLinkCreate_v2(unsigned count, CUjit_option *options, void **values, CUlinkState *state) {
    (void)count, (void)options, (void)values;
    *state = malloc(1);
    return CUDA_SUCCESS;
}
API cuLinkAddData_v2(CUlinkState state, CUjitInputType type, void *data, size_t size, const char *name,
                     unsigned count, CUjit_option *options, void **values) {
    (void)state, (void)type, (void)data, (void)size, (void)name, (void)count, (void)options, (void)values;
    return CUDA_SUCCESS;
}
API cuLinkComplete(CUlinkState state, void **image, size_t *size) {
    static char nothing[16];
    (void)state;
    *image = nothing;
    *size = sizeof nothing;
    return CUDA_SUCCESS;
}
API cuLinkDestroy(CUlinkState state) {
    free(state);
    return CUDA_SUCCESS;
}
API cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                           const cuuint64_t *dimensions, const cuuint64_t *strides, const cuuint32_t *box,
                           const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                           CUtensorMapFloatOOBfill fill) {
    (void)type, (void)rank, (void)address, (void)dimensions, (void)strides, (void)box, (void)element_strides;
    (void)interleave, (void)swizzle, (void)promotion, (void)fill;
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

/* The simulated CUDA driver: errors, devices, contexts. */
#include "driver.h"

extern const struct { int code; const char *name; } driver_error_names[]; /* generated */

/* The primary context of a device is the address of its place here. */
static char contexts[MAX_CARDS];
CUcontext context_of(int device) { return (CUcontext)&contexts[device]; }
static int device_of(CUcontext context) { return (int)((char *)context - contexts); }

CUresult error_of(MemoryResult result) {
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
API cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }
API cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = limit == CU_LIMIT_PRINTF_FIFO_SIZE ? MIB : limit == CU_LIMIT_MALLOC_HEAP_SIZE ? 8 * MIB : 1024;
    return CUDA_SUCCESS;
}
API cuCtxSynchronize(void) { return CUDA_SUCCESS; }

/* The simulated CUDA runtime: device, errors, streams, events, driver entry points. */
#define _GNU_SOURCE
#include "runtime.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- errors ---- */

static __thread cudaError_t last_error;
extern const struct { int code; const char *name; } error_names[]; /* generated */

cudaError_t result_of(cudaError_t error) {
    if (error) last_error = error;
    return error;
}

cudaError_t error_of(MemoryResult result) {
    static const cudaError_t errors[] = {
        [MEMORY_OK] = cudaSuccess,
        [MEMORY_FULL] = cudaErrorMemoryAllocation,
        [MEMORY_INVALID] = cudaErrorInvalidValue,
        [MEMORY_KNOWN] = cudaErrorHostMemoryAlreadyRegistered,
        [MEMORY_DEAD] = cudaErrorInitializationError,
    };
    return result_of(errors[result]);
}

cudaError_t open_context(void) { return error_of(card_context_open(card_current())); }

API cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
API cudaPeekAtLastError(void) { return last_error; }

__attribute__((visibility("default"))) const char *CUDARTAPI cudaGetErrorName(cudaError_t error) {
    for (size_t i = 0; error_names[i].name; i++)
        if (error_names[i].code == (int)error) return error_names[i].name;
    return "unrecognized error code";
}

__attribute__((visibility("default"))) const char *CUDARTAPI cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInitializationError: return "initialization error";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDeviceFunction: return "invalid device function";
        case cudaErrorNotSupported: return "operation not supported";
        default: return cudaGetErrorName(error);
    }
}

/* ---- the device ---- */

API cudaGetDeviceCount(int *count) {
    *count = card_visible_count();
    return result_of(*count ? cudaSuccess : cudaErrorNoDevice);
}
API cudaGetDevice(int *device) {
    *device = card_current();
    return cudaSuccess;
}
API cudaSetDevice(int device) {
    if (card_behind(device) < 0) return result_of(cudaErrorInvalidDevice);
    card_make_current(device);
    return open_context();
}
API cudaDeviceSynchronize(void) { return open_context(); }
API cudaDeviceReset(void) { return cudaSuccess; }
API cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
API cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

API cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    if (card_behind(device) < 0) return result_of(cudaErrorInvalidDevice);
    if (!card_attribute(card_behind(device), (int)attribute, value))
        WARN("device attribute %d is not known: 0", (int)attribute);
    return cudaSuccess;
}

static int attribute(int card, int number) {
    int value = 0;
    card_attribute(card, number, &value);
    return value;
}

API cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    int card = card_behind(device);
    if (card < 0) return result_of(cudaErrorInvalidDevice);
    const Gpu *g = card_gpu();
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", g->name);
    card_uuid(card, (unsigned char *)&p->uuid);
    p->totalGlobalMem = g->capacity;
    p->sharedMemPerBlock = 48 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->memPitch = 2147483647;
    p->maxThreadsPerBlock = 1024;
    memcpy(p->maxThreadsDim, (int[]){1024, 1024, 64}, sizeof p->maxThreadsDim);
    memcpy(p->maxGridSize, (int[]){2147483647, 65535, 65535}, sizeof p->maxGridSize);
    p->totalConstMem = 64 << 10;
    p->major = (int)g->major, p->minor = (int)g->minor;
    p->textureAlignment = p->surfaceAlignment = 512;
    p->texturePitchAlignment = 32;
    p->multiProcessorCount = (int)g->multiprocessors;
    p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = 1;
    p->ECCEnabled = attribute(card, CU_DEVICE_ATTRIBUTE_ECC_ENABLED);
    p->pciBusID = attribute(card, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID);
    p->asyncEngineCount = attribute(card, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
    p->memoryBusWidth = (int)g->bus_bits;
    p->l2CacheSize = (int)g->l2;
    p->persistingL2CacheMaxSize = attribute(card, CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE);
    p->maxThreadsPerMultiProcessor = (int)g->threads;
    p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = 1;
    p->sharedMemPerMultiprocessor = g->shared;
    p->managedMemory = p->concurrentManagedAccess = p->computePreemptionSupported = 1;
    p->canUseHostPointerForRegisteredMem = p->cooperativeLaunch = 1;
    p->sharedMemPerBlockOptin = g->block_shared;
    p->maxBlocksPerMultiProcessor = (int)g->blocks;
    p->accessPolicyMaxWindowSize = attribute(card, CU_DEVICE_ATTRIBUTE_MAX_ACCESS_POLICY_WINDOW_SIZE);
    p->reservedSharedMemPerBlock = (size_t)attribute(card, CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK);
    p->hostRegisterSupported = p->memoryPoolsSupported = p->unifiedFunctionPointers = 1;
    p->clusterLaunch = attribute(card, CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH);
    p->ipcEventSupported = 1;
#if CUDART_VERSION >= 13000
    p->hostNumaId = -1;
#endif
    return cudaSuccess;
}

API cudaDeviceGetPCIBusId(char *text, int length, int device) {
    if (card_behind(device) < 0) return result_of(cudaErrorInvalidDevice);
    snprintf(text, (size_t)length, "0000:%02x:00.0", PCI_BUS(card_behind(device)));
    return cudaSuccess;
}
/* Cards for data centres reach each other's memory, those for games do not. */
API cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    if (card_behind(device) < 0 || card_behind(peer) < 0) return result_of(cudaErrorInvalidDevice);
    *can = device != peer && !strstr(card_gpu()->name, "GeForce");
    return cudaSuccess;
}
API cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    (void)flags;
    int can;
    cudaError_t error = cudaDeviceCanAccessPeer(&can, card_current(), peer);
    return error || can ? error : result_of(cudaErrorPeerAccessUnsupported);
}
API cudaProfilerStart(void) { return cudaSuccess; }
API cudaProfilerStop(void) { return cudaSuccess; }

/* ---- streams: everything that is put on them has happened when the call returns ---- */

static struct CUstream_st default_streams[MAX_CARDS];

struct CUstream_st *stream_of(cudaStream_t stream) {
    return (uintptr_t)stream <= 2 ? &default_streams[card_current()] : stream;
}

API cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    cudaError_t error = open_context();
    if (error) return error;
    *stream = calloc(1, sizeof **stream);
    (*stream)->device = card_current(), (*stream)->flags = flags, (*stream)->priority = priority;
    return cudaSuccess;
}
API cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaStreamDestroy(cudaStream_t stream) {
    if ((uintptr_t)stream > 2) free(stream);
    return cudaSuccess;
}
API cudaStreamQuery(cudaStream_t stream) { return (void)stream, cudaSuccess; }
API cudaStreamSynchronize(cudaStream_t stream) { return (void)stream, cudaSuccess; }
API cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    (void)stream, (void)event, (void)flags;
    return cudaSuccess;
}
API cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = stream_of(stream)->priority;
    return cudaSuccess;
}
API cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) {
    *flags = stream_of(stream)->flags;
    return cudaSuccess;
}
API cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
API cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    (void)stream;
    function(data);
    return cudaSuccess;
}
API cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags) {
    (void)flags;
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

/* ---- events: complete as soon as recorded; times are the host's ---- */

struct CUevent_st { struct timespec at; };

API cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    (void)flags;
    cudaError_t error = open_context();
    if (!error) *event = calloc(1, sizeof **event);
    return error;
}
API cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
API cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
API cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    (void)stream, (void)flags;
    clock_gettime(CLOCK_MONOTONIC, &event->at);
    return cudaSuccess;
}
API cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
API cudaEventQuery(cudaEvent_t event) { return (void)event, cudaSuccess; }
API cudaEventSynchronize(cudaEvent_t event) { return (void)event, cudaSuccess; }
API cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    *ms = (float)((double)(end->at.tv_sec - start->at.tv_sec) * 1e3 +
                  (double)(end->at.tv_nsec - start->at.tv_nsec) / 1e6);
    return cudaSuccess;
}

/* ---- functions of the driver, by name ---- */

API cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     enum cudaDriverEntryPointQueryResult *status) {
    (void)version, (void)flags;
    static void *driver;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
    char renamed[128];
    snprintf(renamed, sizeof renamed, "%s_v2", name);
    *function = driver ? dlsym(driver, renamed) : NULL;
    if (driver && !*function) *function = dlsym(driver, name);
    if (!*function) WARN("driver function %s: not simulated", name);
    if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
#if CUDART_VERSION < 13000
API cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                            enum cudaDriverEntryPointQueryResult *status) {
    return cudaGetDriverEntryPointByVersion(name, function, CUDART_VERSION, flags, status);
}
#endif

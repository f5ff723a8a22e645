/* The simulated CUDA runtime: registered kernels, launches (which do nothing, but for fills.c), occupancy, symbols. */
#include "runtime.h"

#include <stdlib.h>
#include <string.h>

#define REGISTERS 32 /* of every kernel: what the compiled code needs is not looked at */

typedef struct Kernel {
    const void *host;
    const char *name;
    int thread_limit; /* of __launch_bounds__, or 1024 */
    int shared_limit; /* dynamic shared memory that it may ask for */
    int fill_width;   /* of a kernel that is run, 0 of others, -1 where it was never launched */
} Kernel;
typedef struct { const void *host; size_t size; void *memory; } Symbol;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Kernel **table; /* open addressing by the host's pointer */
static size_t kernel_count, table_size;
static Symbol *symbols;
static size_t symbol_count, symbol_room;
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } configurations[8];
static __thread int depth;

/* ---- the table of kernels ---- */

static size_t slot_of(const void *host) {
    size_t at = ((uintptr_t)host >> 4) * 11400714819323198485u & (table_size - 1);
    while (table[at] && table[at]->host != host) at = (at + 1) & (table_size - 1);
    return at;
}

static void grow(void) {
    Kernel **old = table;
    size_t old_size = table_size;
    table_size = table_size ? 2 * table_size : 1 << 16;
    table = calloc(table_size, sizeof *table);
    if (!table) abort();
    for (size_t i = 0; i < old_size; i++)
        if (old[i]) table[slot_of(old[i]->host)] = old[i];
    free(old);
}

static Kernel *add_kernel(const void *host, const char *name, int thread_limit) {
    if (2 * (kernel_count + 1) > table_size) grow();
    size_t at = slot_of(host);
    if (!table[at]) {
        table[at] = malloc(sizeof(Kernel));
        kernel_count++;
    }
    *table[at] = (Kernel){host, name, thread_limit > 0 && thread_limit < 1024 ? thread_limit : 1024, 48 << 10, -1};
    return table[at];
}

/* By the pointer of the host's stub, or by the kernel's own handle. */
static Kernel *find_kernel(const void *function) {
    Kernel *found = NULL;
    pthread_mutex_lock(&lock);
    if (table_size) found = table[slot_of(function)];
    pthread_mutex_unlock(&lock);
    if (found || !function) return found;
    const Kernel *handle = function;
    pthread_mutex_lock(&lock);
    if (table_size && (uintptr_t)function % 16 == 0) {
        for (size_t i = 0; i < table_size && !found; i++)
            if (table[i] == handle) found = table[i];
    }
    pthread_mutex_unlock(&lock);
    return found;
}

/* ---- what nvcc's startup code calls ---- */

#define EXPORT __attribute__((visibility("default")))

EXPORT void **CUDARTAPI __cudaRegisterFatBinary(void *binary) {
    void **handle = malloc(sizeof *handle);
    *handle = binary;
    return handle;
}
EXPORT void CUDARTAPI __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
EXPORT void CUDARTAPI __cudaUnregisterFatBinary(void **handle) { free(handle); }
EXPORT char CUDARTAPI __cudaInitModule(void **handle) { return (void)handle, 1; }
EXPORT void CUDARTAPI __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name,
                                             int thread_limit, uint3 *tid, uint3 *bid, dim3 *block, dim3 *grid,
                                             int *warp) {
    (void)handle, (void)device, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
    pthread_mutex_lock(&lock);
    add_kernel(host, name, thread_limit);
    pthread_mutex_unlock(&lock);
}
EXPORT void CUDARTAPI __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external,
                                        size_t size, int constant, int global) {
    (void)handle, (void)device, (void)name, (void)external, (void)constant, (void)global;
    pthread_mutex_lock(&lock);
    if (symbol_count == symbol_room) {
        symbol_room = symbol_room ? 2 * symbol_room : 256;
        symbols = realloc(symbols, symbol_room * sizeof *symbols);
        if (!symbols) abort();
    }
    symbols[symbol_count++] = (Symbol){host, size, NULL};
    pthread_mutex_unlock(&lock);
}
EXPORT unsigned CUDARTAPI __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                                      struct CUstream_st *stream) {
    if (depth == 8) return 1;
    configurations[depth].grid = grid, configurations[depth].block = block;
    configurations[depth].shared = shared, configurations[depth].stream = stream;
    depth++;
    return 0;
}
API __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (!depth) return result_of(cudaErrorMissingConfiguration);
    depth--;
    *grid = configurations[depth].grid, *block = configurations[depth].block;
    *shared = configurations[depth].shared, *(cudaStream_t *)stream = configurations[depth].stream;
    return cudaSuccess;
}
API __cudaGetKernel(cudaKernel_t *handle, const void *function) {
    Kernel *kernel = find_kernel(function);
    *handle = (cudaKernel_t)kernel;
    return kernel ? cudaSuccess : result_of(cudaErrorInvalidDeviceFunction);
}
API cudaGetKernel(cudaKernel_t *handle, const void *function) { return __cudaGetKernel(handle, function); }

/* ---- launches ---- */

static cudaError_t launch(Kernel *kernel, dim3 grid, dim3 block, size_t shared, void **arguments) {
    cudaError_t error = open_context();
    if (error) return error;
    if (!kernel) return result_of(cudaErrorInvalidDeviceFunction);
    TRACE("launch %s grid %u,%u,%u block %u,%u,%u shared %zu", kernel->name, grid.x, grid.y, grid.z, block.x, block.y,
          block.z, shared);
    size_t threads = (size_t)block.x * block.y * block.z;
    if (!threads || threads > (size_t)kernel->thread_limit || block.z > 64 || !grid.x || !grid.y || !grid.z ||
        grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
        WARN("launch of %s refused: grid %u,%u,%u block %u,%u,%u", kernel->name, grid.x, grid.y, grid.z, block.x,
             block.y, block.z);
        return result_of(cudaErrorInvalidConfiguration);
    }
    if (shared > (size_t)kernel->shared_limit) {
        WARN("launch of %s refused: %zu bytes of shared memory", kernel->name, shared);
        return result_of(cudaErrorInvalidValue);
    }
    if (kernel->fill_width < 0) kernel->fill_width = fill_width(kernel->name);
    if (kernel->fill_width && arguments) fill(kernel->fill_width, arguments);
    return cudaSuccess;
}

API __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void **arguments, size_t shared,
                       cudaStream_t stream) {
    (void)stream;
    return launch((Kernel *)handle, grid, block, shared, arguments);
}
API cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                     cudaStream_t stream) {
    (void)stream;
    return launch(find_kernel(function), grid, block, shared, arguments);
}
API cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                cudaStream_t stream) {
    return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}
API cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                            config->stream);
}

/* ---- what a kernel needs ---- */

API cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    Kernel *kernel = find_kernel(function);
    if (!kernel) return result_of(cudaErrorInvalidDeviceFunction);
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = kernel->thread_limit;
    attributes->numRegs = REGISTERS;
    attributes->ptxVersion = attributes->binaryVersion = (int)card_gpu()->code_version;
    attributes->maxDynamicSharedSizeBytes = kernel->shared_limit;
    attributes->preferredShmemCarveout = -1;
    return cudaSuccess;
}

static cudaError_t set_attribute(Kernel *kernel, enum cudaFuncAttribute attribute, int value) {
    if (!kernel) return result_of(cudaErrorInvalidDeviceFunction);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > card_gpu()->block_shared) return result_of(cudaErrorInvalidValue);
    kernel->shared_limit = value;
    return cudaSuccess;
}
API cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    return set_attribute(find_kernel(function), attribute, value);
}
API cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value, int device) {
    (void)device;
    return set_attribute((Kernel *)kernel, attribute, value);
}
API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                           size_t shared, unsigned flags) {
    (void)flags;
    if (!find_kernel(function)) return result_of(cudaErrorInvalidDeviceFunction);
    *blocks = card_occupancy(threads, shared, REGISTERS);
    return cudaSuccess;
}
API cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

/* ---- libraries of code loaded at run time: every kernel is in them ---- */

API cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *options, void **values,
                        unsigned count, enum cudaLibraryOption *library_options, void **library_values,
                        unsigned library_count) {
    (void)code, (void)options, (void)values, (void)count;
    (void)library_options, (void)library_values, (void)library_count;
    *library = malloc(1);
    return cudaSuccess;
}
API cudaLibraryUnload(cudaLibrary_t library) {
    free(library);
    return cudaSuccess;
}
API cudaLibraryGetKernel(cudaKernel_t *handle, cudaLibrary_t library, const char *name) {
    (void)library;
    char *stub = malloc(16); /* its address stands for the kernel */
    pthread_mutex_lock(&lock);
    *handle = (cudaKernel_t)add_kernel(stub, strdup(name), 1024);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* ---- variables on the card ---- */

API cudaGetSymbolAddress(void **pointer, const void *symbol) {
    cudaError_t error = result_of(cudaErrorInvalidSymbol);
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < symbol_count && error; i++) {
        if (symbols[i].host != symbol) continue;
        if (!symbols[i].memory) symbols[i].memory = calloc(1, symbols[i].size);
        *pointer = symbols[i].memory;
        error = cudaSuccess;
    }
    pthread_mutex_unlock(&lock);
    return error;
}
API cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind kind) {
    (void)kind;
    void *to;
    cudaError_t error = cudaGetSymbolAddress(&to, symbol);
    if (!error) memcpy((char *)to + offset, from, size);
    return error;
}

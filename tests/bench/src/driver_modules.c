/* The simulated CUDA driver: code that is compiled at run time (NVRTC, Triton), accepted, never run. */
#include "driver.h"

#include <stdlib.h>
#include <string.h>

#define REGISTERS 32 /* of every kernel: what its code needs is not looked at */
#define SHARED_LIMIT (48 << 10) /* of a kernel that did not ask for more */

struct CUfunc_st { int shared_limit; };

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
    *function = malloc(sizeof **function); /* never freed: who launches keeps them */
    **function = (struct CUfunc_st){SHARED_LIMIT};
    return CUDA_SUCCESS;
}
API cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    switch ((int)attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = REGISTERS; break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->shared_limit; break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = (int)(card_gpu()->major * 10 + card_gpu()->minor); break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}
API cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value < 0 || (size_t)value > card_gpu()->block_shared) return CUDA_ERROR_INVALID_VALUE;
    function->shared_limit = value;
    return CUDA_SUCCESS;
}
API cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    (void)function, (void)config;
    return CUDA_SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    (void)function;
    *blocks = card_occupancy(threads, shared, REGISTERS);
    return CUDA_SUCCESS;
}
API cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    (void)function;
    int threads = (int)(config->blockDimX * config->blockDimY * config->blockDimZ);
    *clusters = card_occupancy(threads, config->sharedMemBytes, REGISTERS) * (int)card_gpu()->multiprocessors;
    return CUDA_SUCCESS;
}
API cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, CUstream stream, void **arguments, void **extra) {
    (void)stream, (void)arguments, (void)extra;
    size_t threads = (size_t)bx * by * bz;
    bool sized = gx && gy && gz && gx <= 2147483647u && gy <= 65535 && gz <= 65535 && threads && threads <= 1024;
    if (sized && shared <= (unsigned)function->shared_limit) return error_of(card_context_open(card_current()));
    WARN("launch refused: grid %u,%u,%u block %u,%u,%u shared %u", gx, gy, gz, bx, by, bz, shared);
    return CUDA_ERROR_INVALID_VALUE;
}
API cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                          config->blockDimY, config->blockDimZ, config->sharedMemBytes, config->hStream, arguments,
                          extra);
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
API cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                            const cuuint64_t *dimensions, const cuuint64_t *strides, const int *lower, const int *upper,
                            cuuint32_t channels, cuuint32_t pixels, const cuuint32_t *element_strides,
                            CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                            CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    (void)type, (void)rank, (void)address, (void)dimensions, (void)strides, (void)lower, (void)upper, (void)channels;
    (void)pixels, (void)element_strides, (void)interleave, (void)swizzle, (void)promotion, (void)fill;
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

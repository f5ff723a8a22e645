/* The simulated CUDA driver: memory; address space apart from what lies behind it (expandable segments). */
#include "driver.h"

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
API cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
    for (unsigned i = 0; i < count; i++) {
        CUresult error = cuPointerGetAttribute(data[i], attributes[i], pointer);
        if (error) return error;
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

/* libcudnn.so.9: descriptors that remember what they were given, one engine for every graph.
 *
 * Sizes: convolutions and graphs take CARD_CUDNN_WORKSPACE bytes (0) of workspace; RNNs the exact
 * weights and CARD_CUDNN_RNN_RESERVE bytes (0) a call. What cuDNN itself would choose is not known here.
 */
#include "card.h"

#include <cudnn.h>
#include <stdlib.h>
#include <string.h>

#define OK CUDNN_STATUS_SUCCESS

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion(void) { return CUDA_VERSION; }
const char *cudnnGetErrorString(cudnnStatus_t status) {
    return status ? "CUDNN_STATUS_NOT_SUPPORTED" : "CUDNN_STATUS_SUCCESS";
}
void cudnnGetLastErrorString(char *message, size_t size) {
    if (size) *message = 0;
}
cudnnStatus_t cudnnGetProperty(libraryPropertyType type, int *value) {
    *value = type == MAJOR_VERSION ? CUDNN_MAJOR : type == MINOR_VERSION ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
    return OK;
}

struct cudnnContext { cudaStream_t stream; };
cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
    *handle = calloc(1, sizeof **handle);
    return OK;
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    return OK;
}
cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
    *stream = handle->stream;
    return OK;
}

/* ---- the graph API: a descriptor is a list of attributes ---- */

typedef struct Attribute {
    struct Attribute *next;
    cudnnBackendAttributeName_t name;
    cudnnBackendAttributeType_t type;
    int64_t count;
    void *data;
} Attribute;
typedef struct Descriptor {
    cudnnBackendDescriptorType_t type;
    Attribute *attributes;
} Descriptor;

static size_t width_of(cudnnBackendAttributeType_t type) {
    switch (type) {
        case CUDNN_TYPE_BOOLEAN: return sizeof(bool);
        case CUDNN_TYPE_CHAR: return 1;
        case CUDNN_TYPE_HANDLE:
        case CUDNN_TYPE_INT64:
        case CUDNN_TYPE_DOUBLE:
        case CUDNN_TYPE_VOID_PTR:
        case CUDNN_TYPE_BACKEND_DESCRIPTOR: return 8;
        case CUDNN_TYPE_FRACTION: return 16;
        default: return 4;
    }
}

static Attribute *find(const Descriptor *descriptor, cudnnBackendAttributeName_t name) {
    Attribute *attribute = descriptor->attributes;
    while (attribute && attribute->name != name) attribute = attribute->next;
    return attribute;
}

static void put(Descriptor *descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                int64_t count, const void *data) {
    Attribute *attribute = find(descriptor, name);
    if (!attribute) {
        attribute = calloc(1, sizeof *attribute);
        attribute->next = descriptor->attributes;
        attribute->name = name;
        descriptor->attributes = attribute;
    }
    size_t bytes = (size_t)count * width_of(type);
    free(attribute->data);
    attribute->type = type, attribute->count = count;
    attribute->data = malloc(bytes ? bytes : 1);
    if (data) memcpy(attribute->data, data, bytes);
}

static void clear(Descriptor *descriptor) {
    while (descriptor->attributes) {
        Attribute *attribute = descriptor->attributes;
        descriptor->attributes = attribute->next;
        free(attribute->data);
        free(attribute);
    }
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *descriptor) {
    Descriptor *made = calloc(1, sizeof *made);
    made->type = type;
    *descriptor = made;
    return OK;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
    if (descriptor) clear(descriptor);
    free(descriptor);
    return OK;
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) { return (void)descriptor, OK; }
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack) {
    (void)handle, (void)plan, (void)pack;
    return OK;
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t count, const void *elements) {
    put(descriptor, name, type, count, elements);
    return OK;
}

/* What a descriptor that was never told has: one engine, one configuration, the workspace of the rule. */
static int64_t number_of(cudnnBackendAttributeName_t name) {
    switch ((int)name) {
        case CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT: return 1;
        case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE:
        case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE: return (int64_t)card_bytes_of("CARD_CUDNN_WORKSPACE", 0);
        default: return 0;
    }
}

static bool has_one(cudnnBackendAttributeName_t name) {
    switch ((int)name) {
        case CUDNN_ATTR_ENGINEHEUR_RESULTS:
        case CUDNN_ATTR_ENGINECFG_ENGINE:
        case CUDNN_ATTR_ENGINE_GLOBAL_INDEX:
        case CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT:
        case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE:
        case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE:
        case CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED: return true;
        default: return false;
    }
}

/* Descriptors are not handed out: the caller's are made like those that are asked for. */
static void copy_descriptor(Descriptor *to, const Descriptor *from) {
    if (to == from) return;
    clear(to);
    to->type = from->type;
    for (const Attribute *a = from->attributes; a; a = a->next) put(to, a->name, a->type, a->count, a->data);
}

cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t requested, int64_t *count,
                                       void *elements) {
    Attribute *known = find(descriptor, name);
    int64_t available = known ? known->count : has_one(name) ? 1 : 0;
    if (count) *count = available;
    if (!elements || !requested || !available) return OK;
    if (available > requested) available = requested;
    if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR) {
        Descriptor **to = elements, **from = known ? known->data : NULL;
        for (int64_t i = 0; from && i < available; i++)
            if (to[i]) copy_descriptor(to[i], from[i]);
    } else if (known) {
        memcpy(elements, known->data, (size_t)available * width_of(type));
    } else {
        memset(elements, 0, width_of(type));
        int64_t number = number_of(name);
        memcpy(elements, &number, width_of(type) < 8 ? width_of(type) : 8);
    }
    return OK;
}

/* ---- tensors and filters: what is read back is what was set ---- */

typedef struct { int kind, type, format, dimensions, sizes[CUDNN_DIM_MAX], strides[CUDNN_DIM_MAX]; } Shape;

cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t *descriptor) {
    *descriptor = calloc(1, sizeof(Shape));
    return OK;
}
cudnnStatus_t cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t descriptor) {
    free(descriptor);
    return OK;
}
cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t *descriptor) {
    *descriptor = calloc(1, sizeof(Shape));
    return OK;
}
cudnnStatus_t cudnnDestroyFilterDescriptor(cudnnFilterDescriptor_t descriptor) {
    free(descriptor);
    return OK;
}
cudnnStatus_t cudnnSetTensorNdDescriptor(cudnnTensorDescriptor_t descriptor, cudnnDataType_t type, int dimensions,
                                         const int sizes[], const int strides[]) {
    Shape *shape = (Shape *)descriptor;
    shape->type = (int)type, shape->dimensions = dimensions;
    memcpy(shape->sizes, sizes, (size_t)dimensions * sizeof *sizes);
    memcpy(shape->strides, strides, (size_t)dimensions * sizeof *strides);
    return OK;
}
cudnnStatus_t cudnnGetTensorNdDescriptor(const cudnnTensorDescriptor_t descriptor, int requested,
                                         cudnnDataType_t *type, int *dimensions, int sizes[], int strides[]) {
    const Shape *shape = (const Shape *)descriptor;
    *type = (cudnnDataType_t)shape->type, *dimensions = shape->dimensions;
    for (int i = 0; i < requested && i < shape->dimensions; i++)
        sizes[i] = shape->sizes[i], strides[i] = shape->strides[i];
    return OK;
}
cudnnStatus_t cudnnSetFilterNdDescriptor(cudnnFilterDescriptor_t descriptor, cudnnDataType_t type,
                                         cudnnTensorFormat_t format, int dimensions, const int sizes[]) {
    Shape *shape = (Shape *)descriptor;
    shape->type = (int)type, shape->format = (int)format, shape->dimensions = dimensions;
    memcpy(shape->sizes, sizes, (size_t)dimensions * sizeof *sizes);
    return OK;
}
cudnnStatus_t cudnnGetFilterNdDescriptor(const cudnnFilterDescriptor_t descriptor, int requested,
                                         cudnnDataType_t *type, cudnnTensorFormat_t *format, int *dimensions,
                                         int sizes[]) {
    const Shape *shape = (const Shape *)descriptor;
    *type = (cudnnDataType_t)shape->type, *format = (cudnnTensorFormat_t)shape->format;
    *dimensions = shape->dimensions;
    for (int i = 0; i < requested && i < shape->dimensions; i++) sizes[i] = shape->sizes[i];
    return OK;
}

/* ---- recurrent networks: where each weight lies in the one buffer of weights ---- */

struct cudnnRNNStruct {
    int gates, directions, layers, input, hidden, projection, biases;
    cudnnDataType_t type;
};

cudnnStatus_t cudnnCreateRNNDescriptor(cudnnRNNDescriptor_t *descriptor) {
    *descriptor = calloc(1, sizeof **descriptor);
    return OK;
}
cudnnStatus_t cudnnDestroyRNNDescriptor(cudnnRNNDescriptor_t descriptor) {
    free(descriptor);
    return OK;
}
cudnnStatus_t cudnnSetRNNDescriptor_v8(cudnnRNNDescriptor_t rnn, cudnnRNNAlgo_t algorithm, cudnnRNNMode_t cell,
                                       cudnnRNNBiasMode_t bias, cudnnDirectionMode_t direction,
                                       cudnnRNNInputMode_t input_mode, cudnnDataType_t type,
                                       cudnnDataType_t precision, cudnnMathType_t math, int32_t input, int32_t hidden,
                                       int32_t projection, int32_t layers, cudnnDropoutDescriptor_t dropout,
                                       uint32_t flags) {
    (void)algorithm, (void)input_mode, (void)precision, (void)math, (void)dropout, (void)flags;
    rnn->gates = cell == CUDNN_LSTM ? 4 : cell == CUDNN_GRU ? 3 : 1;
    rnn->directions = direction == CUDNN_BIDIRECTIONAL ? 2 : 1;
    rnn->layers = layers, rnn->input = input, rnn->hidden = hidden, rnn->projection = projection;
    rnn->biases = bias == CUDNN_RNN_NO_BIAS ? 0 : bias == CUDNN_RNN_DOUBLE_BIAS ? 2 : 1;
    rnn->type = type;
    return OK;
}

/* Elements before a weight of a pseudo-layer; its rows and columns. Linear layers: the gates for the
 * input, then the gates for the state, then the projection; all matrices first, then all biases. */
static size_t place_of(cudnnRNNDescriptor_t rnn, int wanted_layer, int wanted_linear, bool bias, int *rows,
                       int *columns) {
    size_t at = 0;
    int state = rnn->projection ? rnn->projection : rnn->hidden;
    bool projected = rnn->projection && rnn->projection != rnn->hidden;
    for (int part = 0; part < 2; part++) {
        for (int layer = 0; layer < rnn->layers * rnn->directions; layer++) {
            int input = layer < rnn->directions ? rnn->input : state * rnn->directions;
            for (int linear = 0; linear < 2 * rnn->gates + projected; linear++) {
                bool is_projection = linear == 2 * rnn->gates;
                *rows = is_projection ? rnn->projection : rnn->hidden;
                *columns = part ? 1 : is_projection ? rnn->hidden : linear < rnn->gates ? input : state;
                if (part && (is_projection || !rnn->biases || (rnn->biases == 1 && linear >= rnn->gates))) *rows = 0;
                if (part == bias && layer == wanted_layer && linear == wanted_linear) return at;
                at += (size_t)*rows * (size_t)*columns;
            }
        }
    }
    return at;
}
static size_t element_bytes(cudnnDataType_t type) {
    return type == CUDNN_DATA_DOUBLE ? 8 : type == CUDNN_DATA_FLOAT ? 4 : 2;
}
cudnnStatus_t cudnnGetRNNWeightSpaceSize(cudnnHandle_t handle, cudnnRNNDescriptor_t rnn, size_t *size) {
    (void)handle;
    int rows, columns;
    *size = place_of(rnn, -1, -1, true, &rows, &columns) * element_bytes(rnn->type);
    return OK;
}
static void *weight(cudnnRNNDescriptor_t rnn, int layer, int linear, bool bias, const void *space,
                    cudnnTensorDescriptor_t descriptor) {
    int rows, columns;
    size_t at = place_of(rnn, layer, linear, bias, &rows, &columns);
    if (!rows) return NULL;
    int sizes[] = {1, rows, columns}, strides[] = {rows * columns, columns, 1};
    cudnnSetTensorNdDescriptor(descriptor, rnn->type, 3, sizes, strides);
    return (char *)(uintptr_t)space + at * element_bytes(rnn->type);
}
cudnnStatus_t cudnnGetRNNWeightParams(cudnnHandle_t handle, cudnnRNNDescriptor_t rnn, int32_t layer, size_t size,
                                      const void *space, int32_t linear, cudnnTensorDescriptor_t matrix,
                                      void **matrix_at, cudnnTensorDescriptor_t bias, void **bias_at) {
    (void)handle, (void)size;
    if (matrix) *matrix_at = weight(rnn, layer, linear, false, space, matrix);
    if (bias) *bias_at = weight(rnn, layer, linear, true, space, bias);
    return OK;
}
cudnnStatus_t cudnnGetRNNTempSpaceSizes(cudnnHandle_t handle, cudnnRNNDescriptor_t rnn, cudnnForwardMode_t mode,
                                        cudnnRNNDataDescriptor_t data, size_t *workspace, size_t *reserve) {
    (void)handle, (void)rnn, (void)data;
    *workspace = card_bytes_of("CARD_CUDNN_WORKSPACE", 0);
    if (reserve) *reserve = mode == CUDNN_FWD_MODE_TRAINING ? card_bytes_of("CARD_CUDNN_RNN_RESERVE", 0) : 0;
    return OK;
}

/* ---- the older convolution interface: one algorithm ---- */

#define FOUND(kind, algorithm)                                                   \
    do {                                                                         \
        (void)handle, (void)requested;                                           \
        memset(results, 0, sizeof *results);                                     \
        results->algo = algorithm;                                               \
        results->memory = card_bytes_of("CARD_CUDNN_WORKSPACE", 0);               \
        *returned = 1;                                                           \
        return OK;                                                               \
    } while (0)

cudnnStatus_t cudnnGetConvolutionForwardAlgorithm_v7(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnFilterDescriptor_t w,
    const cudnnConvolutionDescriptor_t c, const cudnnTensorDescriptor_t y, const int requested, int *returned,
    cudnnConvolutionFwdAlgoPerf_t *results) {
    (void)x, (void)w, (void)c, (void)y;
    FOUND(Fwd, CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM);
}
cudnnStatus_t cudnnGetConvolutionBackwardDataAlgorithm_v7(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t w, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t c, const cudnnTensorDescriptor_t dx, const int requested, int *returned,
    cudnnConvolutionBwdDataAlgoPerf_t *results) {
    (void)w, (void)dy, (void)c, (void)dx;
    FOUND(BwdData, CUDNN_CONVOLUTION_BWD_DATA_ALGO_1);
}
cudnnStatus_t cudnnGetConvolutionBackwardFilterAlgorithm_v7(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t c, const cudnnFilterDescriptor_t dw, const int requested, int *returned,
    cudnnConvolutionBwdFilterAlgoPerf_t *results) {
    (void)x, (void)dy, (void)c, (void)dw;
    FOUND(BwdFilter, CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1);
}

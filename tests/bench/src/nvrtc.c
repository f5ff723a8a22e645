/* libnvrtc: every program compiles, to nothing. */
#include "card.h"

#include <nvrtc.h>
#include <stdlib.h>

nvrtcResult nvrtcVersion(int *major, int *minor) {
    *major = CUDA_VERSION / 1000, *minor = CUDA_VERSION % 1000 / 10;
    return NVRTC_SUCCESS;
}
nvrtcResult nvrtcCreateProgram(nvrtcProgram *program, const char *source, const char *name, int count,
                               const char *const *headers, const char *const *names) {
    (void)source, (void)name, (void)count, (void)headers, (void)names;
    *program = malloc(1);
    return NVRTC_SUCCESS;
}
nvrtcResult nvrtcDestroyProgram(nvrtcProgram *program) {
    free(*program);
    *program = NULL;
    return NVRTC_SUCCESS;
}
#define NOTHING(kind)                                                           \
    nvrtcResult nvrtcGet##kind##Size(nvrtcProgram program, size_t *size) {      \
        (void)program;                                                         \
        *size = 1;                                                             \
        return NVRTC_SUCCESS;                                                  \
    }                                                                          \
    nvrtcResult nvrtcGet##kind(nvrtcProgram program, char *text) {              \
        (void)program;                                                         \
        *text = 0;                                                             \
        return NVRTC_SUCCESS;                                                  \
    }
NOTHING(PTX)
NOTHING(CUBIN)
NOTHING(ProgramLog)
nvrtcResult nvrtcGetLoweredName(nvrtcProgram program, const char *const expression, const char **name) {
    (void)program;
    *name = expression;
    return NVRTC_SUCCESS;
}

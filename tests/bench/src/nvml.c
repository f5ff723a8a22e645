/* The part of libnvidia-ml.so.1 that tells which card there is and who holds its memory. */
#include "card.h"

#include <stdlib.h>
#include <string.h>

typedef int Result;
enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7 };
typedef struct Handle *Device;
#define API __attribute__((visibility("default"))) Result
static char handles[MAX_CARDS]; /* of a card: the address of its place here */
static Device handle_of(int card) { return (Device)&handles[card]; }
static int card_of(Device device) { return (int)((char *)device - handles); }

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } Process;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char address[32]; } Pci;

static Result text(char *to, unsigned length, const char *from) {
    if (strlen(from) >= length) return TOO_SMALL;
    strcpy(to, from);
    return OK;
}
API nvmlInit_v2(void) { return OK; }
API nvmlInit(void) { return OK; }
API nvmlInitWithFlags(unsigned flags) { (void)flags; return OK; }
API nvmlShutdown(void) { return OK; }
__attribute__((visibility("default"))) const char *nvmlErrorString(Result result) {
    return result == OK ? "Success" : result == NOT_SUPPORTED ? "Not Supported" : "Error";
}
API nvmlSystemGetDriverVersion(char *to, unsigned length) { return text(to, length, "580.00.00"); }
API nvmlSystemGetNVMLVersion(char *to, unsigned length) { return text(to, length, "13.580.00.00"); }
API nvmlSystemGetCudaDriverVersion(int *version) { *version = CUDA_VERSION; return OK; }
API nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = CUDA_VERSION; return OK; }
API nvmlDeviceGetCount_v2(unsigned *count) { *count = (unsigned)card_count(); return OK; }
API nvmlDeviceGetCount(unsigned *count) { *count = (unsigned)card_count(); return OK; }
API nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *device) {
    if (index >= (unsigned)card_count()) return INVALID_ARGUMENT;
    *device = handle_of((int)index);
    return OK;
}
API nvmlDeviceGetHandleByIndex(unsigned index, Device *device) { return nvmlDeviceGetHandleByIndex_v2(index, device); }
API nvmlDeviceGetHandleByUUID(const char *uuid, Device *device) {
    char known[UUID_TEXT];
    for (int card = 0; card < card_count(); card++) {
        card_uuid_text(card, known);
        *device = handle_of(card);
        if (!strcmp(uuid, known)) return OK;
    }
    return NOT_FOUND;
}
API nvmlDeviceGetHandleByPciBusId_v2(const char *address, Device *device) {
    const char *bus = strchr(address, ':');
    for (int card = 0; bus && card < card_count(); card++) {
        *device = handle_of(card);
        if (strtol(bus + 1, NULL, 16) == PCI_BUS(card)) return OK;
    }
    return NOT_FOUND;
}
API nvmlDeviceGetHandleByPciBusId(const char *address, Device *device) {
    return nvmlDeviceGetHandleByPciBusId_v2(address, device);
}
API nvmlDeviceGetName(Device device, char *to, unsigned length) {
    (void)device;
    return text(to, length, card_gpu()->name);
}
API nvmlDeviceGetUUID(Device device, char *to, unsigned length) {
    char known[UUID_TEXT];
    card_uuid_text(card_of(device), known);
    return text(to, length, known);
}
API nvmlDeviceGetIndex(Device device, unsigned *index) { *index = (unsigned)card_of(device); return OK; }
API nvmlDeviceGetMinorNumber(Device device, unsigned *number) { *number = (unsigned)card_of(device); return OK; }
API nvmlDeviceGetPciInfo_v3(Device device, Pci *pci) {
    *pci = (Pci){.bus = (unsigned)PCI_BUS(card_of(device)), .id = PCI_ID};
    snprintf(pci->legacy, sizeof pci->legacy, "0000:%02x:00.0", pci->bus);
    snprintf(pci->address, sizeof pci->address, "00000000:%02x:00.0", pci->bus);
    return OK;
}
API nvmlDeviceGetCudaComputeCapability(Device device, int *major, int *minor) {
    (void)device;
    *major = (int)card_gpu()->major, *minor = (int)card_gpu()->minor;
    return OK;
}
API nvmlDeviceGetMemoryInfo(Device device, Memory *memory) {
    memory->total = card_gpu()->capacity;
    memory->used = card_usage_total(card_of(device));
    memory->free = memory->total - memory->used;
    return OK;
}
API nvmlDeviceGetMemoryInfo_v2(Device device, MemoryV2 *memory) {
    Memory plain;
    nvmlDeviceGetMemoryInfo(device, &plain);
    memory->total = plain.total, memory->used = plain.used, memory->free = plain.free, memory->reserved = 0;
    return OK;
}
API nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned *count, Process *processes) {
    int pids[64];
    size_t bytes[64];
    int found = card_usage_processes(card_of(device), 64, pids, bytes);
    unsigned room = *count;
    *count = (unsigned)found;
    if (room < (unsigned)found) return TOO_SMALL;
    for (int i = 0; i < found; i++) processes[i] = (Process){(unsigned)pids[i], bytes[i], ~0u, ~0u};
    return OK;
}
API nvmlDeviceGetComputeRunningProcesses(Device device, unsigned *count, Process *processes) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, processes);
}
API nvmlDeviceGetGraphicsRunningProcesses_v3(Device device, unsigned *count, Process *processes) {
    (void)device, (void)processes;
    *count = 0;
    return OK;
}
API nvmlDeviceGetUtilizationRates(Device device, unsigned rates[2]) {
    (void)device;
    rates[0] = rates[1] = 0;
    return OK;
}
#define UNSUPPORTED(name) API name(void) { return NOT_SUPPORTED; }
UNSUPPORTED(nvmlDeviceGetMigMode)
UNSUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
UNSUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
UNSUPPORTED(nvmlDeviceGetNvLinkState)
UNSUPPORTED(nvmlDeviceGetP2PStatus)
UNSUPPORTED(nvmlDeviceGetGpuFabricInfo)
UNSUPPORTED(nvmlDeviceGetGpuFabricInfoV)
UNSUPPORTED(nvmlDeviceGetTemperature)
UNSUPPORTED(nvmlDeviceGetPowerUsage)
UNSUPPORTED(nvmlDeviceGetClockInfo)
UNSUPPORTED(nvmlDeviceGetCpuAffinity)

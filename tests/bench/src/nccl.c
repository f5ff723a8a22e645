/* libnccl.so.2: communicators that know their ranks, collectives whose small messages arrive.
 *
 * Messages of up to SMALL bytes (sizes, flags, pickled objects) are exchanged between the processes
 * through a file in memory that is named by the communicator's id. Larger ones are left where they are, as
 * if every rank had sent the same. Point-to-point messages, and communicators of one process alone, move nothing.
 */
#define _GNU_SOURCE
#include "card.h"

#include <errno.h>
#include <fcntl.h>
#include <nccl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define SMALL ((size_t)1 << 20)
#define PATIENCE_S 120 /* for ranks that do not come */

typedef struct {
    atomic_int attached, arrived, round;
    char slots[][SMALL]; /* of each rank */
} Mailbox;

struct ncclComm {
    int rank, ranks, device, splits;
    unsigned long long id;
    Mailbox *mailbox; /* NULL where all ranks are in this process */
    pthread_mutex_t lock;
};

/* ---- meeting the other ranks ---- */

static ncclResult_t meet(Mailbox *mailbox, int ranks) {
    int round = mailbox->round;
    if (atomic_fetch_add(&mailbox->arrived, 1) == ranks - 1) {
        mailbox->arrived = 0;
        mailbox->round = round + 1;
        return ncclSuccess;
    }
    for (time_t start = time(NULL); mailbox->round == round; sched_yield())
        if (time(NULL) - start > PATIENCE_S) return ncclRemoteError;
    return ncclSuccess;
}

/* Send a message to all ranks, and receive theirs, one after the other. */
static ncclResult_t exchange(ncclComm_t comm, const void *message, size_t size, char *received) {
    pthread_mutex_lock(&comm->lock);
    memcpy(comm->mailbox->slots[comm->rank], message, size);
    ncclResult_t result = meet(comm->mailbox, comm->ranks);
    for (int i = 0; i < comm->ranks && !result; i++) memcpy(received + (size_t)i * size, comm->mailbox->slots[i], size);
    if (!result) result = meet(comm->mailbox, comm->ranks); /* nobody writes before all have read */
    pthread_mutex_unlock(&comm->lock);
    return result;
}

/* The file is gone once all ranks have mapped it. */
static Mailbox *open_mailbox(unsigned long long id, int ranks) {
    char path[64];
    snprintf(path, sizeof path, "/dev/shm/simulated-nccl-%016llx", id);
    size_t size = sizeof(Mailbox) + (size_t)ranks * SMALL;
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) return NULL;
    void *map = MAP_FAILED;
    if (!ftruncate(file, (off_t)size)) map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (map == MAP_FAILED) return NULL;
    Mailbox *mailbox = map;
    if (atomic_fetch_add(&mailbox->attached, 1) == ranks - 1) unlink(path);
    return mailbox;
}

static ncclResult_t make(ncclComm_t *comm, int rank, int ranks, unsigned long long id, bool alone) {
    ncclComm_t made = calloc(1, sizeof *made);
    *made = (struct ncclComm){.rank = rank, .ranks = ranks, .device = card_current(), .id = id};
    pthread_mutex_init(&made->lock, NULL);
    *comm = made;
    if (alone || ranks == 1) return ncclSuccess;
    made->mailbox = open_mailbox(id, ranks);
    return made->mailbox ? meet(made->mailbox, ranks) : ncclSystemError;
}

/* ---- communicators ---- */

ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}
const char *ncclGetErrorString(ncclResult_t result) { return result ? "simulated failure" : "no error"; }
const char *ncclGetLastError(ncclComm_t comm) { return (void)comm, ""; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    memset(id, 0, sizeof *id);
    return getrandom(id->internal, 8, 0) == 8 ? ncclSuccess : ncclSystemError;
}
static unsigned long long number_of(const ncclUniqueId *id) {
    unsigned long long number;
    memcpy(&number, id->internal, sizeof number);
    return number;
}
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank) {
    return make(comm, rank, ranks, number_of(&id), false);
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config) {
    (void)config;
    return ncclCommInitRank(comm, ranks, id, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *comm, int ranks, int rank, int ids, ncclUniqueId *id,
                                      ncclConfig_t *config) {
    (void)ids;
    return ncclCommInitRankConfig(comm, ranks, id[0], rank, config);
}
ncclResult_t ncclCommInitAll(ncclComm_t *comms, int count, const int *devices) {
    for (int i = 0; i < count; i++) {
        make(&comms[i], i, count, 0, true);
        comms[i]->device = devices ? devices[i] : i;
    }
    return ncclSuccess;
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *made, ncclConfig_t *config) {
    (void)config;
    struct Wish { int color, key; } mine = {color, key}, *wishes = calloc((size_t)comm->ranks, sizeof *wishes);
    wishes[comm->rank] = mine;
    ncclResult_t result = comm->mailbox ? exchange(comm, &mine, sizeof mine, (char *)wishes) : ncclSuccess;
    int rank = 0, ranks = 0;
    for (int i = 0; i < comm->ranks; i++) {
        if (wishes[i].color != color) continue;
        ranks++;
        rank += wishes[i].key < key || (wishes[i].key == key && i < comm->rank);
    }
    free(wishes);
    comm->splits++;
    *made = NULL;
    if (result || color == NCCL_SPLIT_NOCOLOR) return result;
    unsigned long long id = comm->id ^ (unsigned long long)comm->splits << 40 ^ (unsigned long long)color * 2654435761u;
    return make(made, rank, ranks, id, !comm->mailbox);
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (comm->mailbox) munmap(comm->mailbox, sizeof(Mailbox) + (size_t)comm->ranks * SMALL);
    free(comm);
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) { return (void)comm, ncclSuccess; } /* a thread may wait in it */
ncclResult_t ncclCommFinalize(ncclComm_t comm) { return (void)comm, ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
    (void)comm;
    *error = ncclSuccess;
    return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) {
    *count = comm->ranks;
    return ncclSuccess;
}
ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device) {
    *device = comm->device;
    return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
    *rank = comm->rank;
    return ncclSuccess;
}
ncclResult_t ncclMemAlloc(void **pointer, size_t size) {
    if (card_context_open(card_current())) return ncclUnhandledCudaError;
    return card_memory_allocate(size, MEM_DEVICE, 0, pointer) ? ncclUnhandledCudaError : ncclSuccess;
}
ncclResult_t ncclMemFree(void *pointer) {
    return card_memory_free(pointer, false) ? ncclInvalidArgument : ncclSuccess;
}

/* ---- collectives ---- */

static size_t width_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt64:
        case ncclUint64:
        case ncclFloat64: return 8;
        case ncclInt32:
        case ncclUint32:
        case ncclFloat32: return 4;
        case ncclFloat16:
        case ncclBfloat16: return 2;
        default: return 1;
    }
}

#define COMBINE(type)                                          \
    for (size_t i = 0; i < count; i++) {                       \
        type *a = (type *)to + i, b = ((const type *)from)[i]; \
        if (op == ncclMax) *a = *a > b ? *a : b;               \
        else if (op == ncclMin) *a = *a < b ? *a : b;          \
        else if (op == ncclProd) *a *= b;                      \
        else *a += b;                                          \
    }                                                          \
    break
static void combine(void *to, const void *from, size_t count, ncclDataType_t type, ncclRedOp_t op) {
    switch (type) {
        case ncclInt8: COMBINE(int8_t);
        case ncclUint8: COMBINE(uint8_t);
        case ncclInt32: COMBINE(int32_t);
        case ncclUint32: COMBINE(uint32_t);
        case ncclInt64: COMBINE(int64_t);
        case ncclUint64: COMBINE(uint64_t);
        case ncclFloat32: COMBINE(float);
        case ncclFloat64: COMBINE(double);
        default: break; /* the first rank's */
    }
}

static ncclResult_t copied(MemoryResult result) { return result ? ncclInvalidArgument : ncclSuccess; }

/* What all ranks sent, one after the other; the caller frees it. NULL where the message stays where it is. */
static char *gathered(ncclComm_t comm, const void *from, size_t size, ncclResult_t *result) {
    *result = ncclSuccess;
    if (!comm->mailbox || size > SMALL) return NULL;
    char *all = malloc((size_t)comm->ranks * size + 1);
    *result = exchange(comm, from, size, all);
    return all;
}

/* What a reduction leaves on each rank: messages [first, first + count) of the result. */
static ncclResult_t reduce(ncclComm_t comm, const void *from, void *to, size_t total, size_t first, size_t count,
                           ncclDataType_t type, ncclRedOp_t op) {
    size_t width = width_of(type);
    ncclResult_t result;
    char *all = gathered(comm, from, total * width, &result);
    if (result) return free(all), result;
    if (!all) return copied(card_memory_copy(to, (const char *)from + first * width, count * width));
    for (int i = 1; i < comm->ranks; i++) combine(all, all + (size_t)i * total * width, total, type, op);
    result = copied(card_memory_copy(to, all + first * width, count * width));
    free(all);
    return result;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    (void)stream;
    return reduce(comm, from, to, count, 0, count, type, op);
}
ncclResult_t ncclReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t stream) {
    (void)stream;
    char *nowhere = NULL;
    if (comm->rank != root) to = nowhere = malloc(count * width_of(type) + 1);
    ncclResult_t result = reduce(comm, from, to, count, 0, count, type, op);
    free(nowhere);
    return result;
}
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
    (void)stream;
    return reduce(comm, from, to, count * (size_t)comm->ranks, count * (size_t)comm->rank, count, type, op);
}
ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    (void)stream;
    size_t size = count * width_of(type);
    ncclResult_t result;
    char *all = gathered(comm, from, size, &result);
    for (int i = 0; i < comm->ranks && !result; i++)
        result = copied(card_memory_copy((char *)to + (size_t)i * size, all ? all + (size_t)i * size : from, size));
    free(all);
    return result;
}
ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
    (void)stream;
    size_t size = count * width_of(type);
    ncclResult_t result;
    char *all = gathered(comm, comm->rank == root ? from : to, size, &result);
    if (!result && all) result = copied(card_memory_copy(to, all + (size_t)root * size, size));
    if (!result && !all && comm->rank == root && from != to) result = copied(card_memory_copy(to, from, size));
    free(all);
    return result;
}
ncclResult_t ncclBcast(void *buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                       cudaStream_t stream) {
    return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}

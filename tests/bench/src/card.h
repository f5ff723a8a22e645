/* What card_core.so gives to the libraries that play CUDA.
 *
 * A card is one of the machine's, by its number; a device is one that this process sees, by its ordinal
 * (CUDA_VISIBLE_DEVICES chooses and orders them).
 */
#ifndef CARD_H
#define CARD_H

#include <cuda.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define MIB ((size_t)1 << 20)
#define PAGE ((size_t)2 * MIB) /* granularity of device memory */

/* ---- log.c: CARD_LOG=0 nothing, 1 what is not simulated and errors, 2 every call ---- */
extern int card_log_level;
void card_log_init(void);
void card_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
void card_stub(const char *name, int *seen);
void card_not_public(const char *name) __attribute__((noreturn));
#define WARN(...) do { if (card_log_level >= 1) card_log(__VA_ARGS__); } while (0)
#define TRACE(...) do { if (card_log_level >= 2) card_log(__VA_ARGS__); } while (0)

/* ---- gpu.c: what the cards are, all of one model ---- */
#define MAX_CARDS 16
#define UUID_TEXT 48
typedef struct {
    char name[64];
    size_t major, minor, code_version, multiprocessors, capacity, context, l2;
    size_t shared, block_shared, threads, blocks; /* of a multiprocessor; shared memory of one block */
    size_t fp64_ratio, clock_khz, memory_clock_khz, bus_bits;
} Gpu;
#define REGISTERS_OF_SM 65536
#define RESERVED_SHARED(gpu) ((gpu)->major >= 8 ? 1024 : 0) /* of every block, by the system */
#define PCI_BUS(card) (7 + (card))
#define PCI_ID 0x20b010de
const Gpu *card_gpu(void);
int card_count(void);
int card_visible_count(void);
int card_behind(int device); /* the card that a device is, or -1 */
size_t card_bytes_of(const char *variable, size_t otherwise); /* "8GiB", "512MiB" or plain bytes */
int card_occupancy(int block_threads, size_t shared_bytes, int registers);
void card_uuid(int card, unsigned char uuid[16]);
void card_uuid_text(int card, char text[UUID_TEXT]);

/* ---- attributes.c ---- */
bool card_attribute(int card, int attribute, int *value); /* false, and 0, where unknown */

/* ---- usage.c: bytes in use on the cards, shared by the processes of one run ---- */
bool card_usage_charge(int card, size_t bytes); /* false where the card is full */
void card_usage_release(int card, size_t bytes);
size_t card_usage_total(int card);
void card_full_at(size_t n);
int card_usage_processes(int card, int room, int *pids, size_t *bytes);

/* ---- context.c: which device a thread uses, and what a process holds on it before it allocates ---- */
int card_current(void); /* this thread's device */
void card_make_current(int device);

/* ---- memory.c ---- */
typedef enum { MEM_DEVICE, MEM_HOST, MEM_REGISTERED, MEM_RESERVED } MemoryKind;
typedef enum { MEMORY_OK, MEMORY_FULL, MEMORY_INVALID, MEMORY_KNOWN, MEMORY_DEAD } MemoryResult;
typedef struct {
    uintptr_t base;
    size_t size, charged;
    MemoryKind kind;
    unsigned flags;
    int device;
    unsigned long long id;
} Block;
typedef struct Physical Physical;

MemoryResult card_context_open(int device); /* charged once */
bool card_context_is_open(int device);
MemoryResult card_memory_allocate(size_t size, MemoryKind kind, unsigned flags, void **pointer);
MemoryResult card_memory_free(void *pointer, bool host);
MemoryResult card_memory_register(void *pointer, size_t size, unsigned flags);
MemoryResult card_memory_unregister(void *pointer);
bool card_memory_find(const void *pointer, Block *found);
MemoryResult card_memory_copy(void *to, const void *from, size_t size);
MemoryResult card_memory_set(void *pointer, const void *value, int width, size_t count); /* width: at most 8 */

MemoryResult card_space_reserve(size_t size, void **pointer);
MemoryResult card_space_free(void *pointer, size_t size);
MemoryResult card_physical_create(int device, size_t size, Physical **handle);
void card_physical_release(Physical *handle);
Physical *card_physical_at(const void *pointer); /* with one more reference, or NULL */
MemoryResult card_space_map(void *pointer, size_t size, Physical *handle);
MemoryResult card_space_unmap(void *pointer, size_t size);
MemoryResult card_space_open(void *pointer, size_t size);

#endif

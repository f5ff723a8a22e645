/* Device memory: address space of this process, committed page by page as the host touches it.
 *
 * Kernels never run, so what stays zero costs nothing: copies into the card skip pages of zeros,
 * and setting to zero gives pages back.
 */
#define _GNU_SOURCE
#include "card.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ARENA_BYTES ((size_t)8 << 40)
#define SMALL MIB /* below it, allocations share pages of device memory */
#define HOST_PAGE 4096
#define FILL_LIMIT (64 * MIB)

struct Physical { size_t size; int device, references; };
typedef struct { uintptr_t base; size_t size; Physical *physical; } Mapping;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uintptr_t arena;
static size_t arena_bytes;
static Block *blocks; /* sorted by base, disjoint */
static size_t block_count, block_room;
static size_t small_bytes[MAX_CARDS]; /* of each device, in allocations that share pages */
static unsigned long long next_id = 1;
static Mapping *mappings;
static size_t mapping_count, mapping_room;

static size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

/* ---- the table of blocks; the lock is held ---- */

static size_t first_at_or_after(uintptr_t pointer) {
    size_t low = 0, high = block_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[middle].base < pointer) low = middle + 1;
        else high = middle;
    }
    return low;
}

static Block *containing(uintptr_t pointer) {
    size_t index = first_at_or_after(pointer);
    if (index < block_count && blocks[index].base == pointer) return &blocks[index];
    if (!index) return NULL;
    Block *before = &blocks[index - 1];
    return pointer - before->base < before->size ? before : NULL;
}

static void add_block(Block block) {
    if (block_count == block_room) {
        block_room = block_room ? 2 * block_room : 1024;
        blocks = realloc(blocks, block_room * sizeof *blocks);
        if (!blocks) abort();
    }
    size_t index = first_at_or_after(block.base);
    memmove(blocks + index + 1, blocks + index, (block_count++ - index) * sizeof *blocks);
    block.id = next_id++;
    blocks[index] = block;
}

static void remove_block(Block *block) {
    size_t index = (size_t)(block - blocks);
    memmove(block, block + 1, (--block_count - index) * sizeof *blocks);
}

bool card_memory_find(const void *pointer, Block *found) {
    pthread_mutex_lock(&lock);
    Block *block = containing((uintptr_t)pointer);
    if (block) *found = *block;
    pthread_mutex_unlock(&lock);
    return block != NULL;
}

/* ---- address space ---- */

static bool open_arena(void) {
    for (size_t bytes = ARENA_BYTES; !arena && bytes >= ARENA_BYTES / 64; bytes /= 2) {
        void *map = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED) continue;
        madvise(map, bytes, MADV_NOHUGEPAGE);
        madvise(map, bytes, MADV_DONTDUMP);
        arena = round_up((uintptr_t)map, PAGE);
        arena_bytes = bytes - PAGE;
    }
    return arena != 0;
}

/* First gap of the arena that takes `size` bytes. */
static uintptr_t find_space(size_t size) {
    if (!open_arena()) return 0;
    uintptr_t at = arena;
    for (size_t i = first_at_or_after(arena); i < block_count; i++) {
        if (blocks[i].base >= arena + arena_bytes) break;
        if (blocks[i].base - at >= size) return at;
        at = round_up(blocks[i].base + blocks[i].size, PAGE);
    }
    return arena + arena_bytes - at >= size ? at : 0;
}

static bool commit(uintptr_t base, size_t size) {
    return !mprotect((void *)base, size, PROT_READ | PROT_WRITE);
}

static void drop(uintptr_t base, size_t size) {
    madvise((void *)base, size, MADV_DONTNEED);
    mprotect((void *)base, size, PROT_NONE);
}

/* ---- allocation ---- */

static bool charge(Block *block) {
    int card = card_behind(block->device);
    if (block->size >= SMALL) {
        block->charged = round_up(block->size, PAGE);
        return card_usage_charge(card, block->charged);
    }
    size_t *small = &small_bytes[block->device];
    size_t before = round_up(*small, PAGE), after = round_up(*small + block->size, PAGE);
    if (after > before && !card_usage_charge(card, after - before)) return false;
    *small += block->size;
    return true;
}

static void discharge(const Block *block) {
    int card = card_behind(block->device);
    size_t *small = &small_bytes[block->device];
    if (block->charged) {
        card_usage_release(card, block->charged);
    } else {
        size_t before = round_up(*small, PAGE);
        *small -= block->size;
        card_usage_release(card, before - round_up(*small, PAGE));
    }
}

/* After a fork, the child's lock may be one that another thread of the parent held. */
static void after_fork(void) { pthread_mutex_init(&lock, NULL); }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }

MemoryResult card_memory_allocate(size_t size, MemoryKind kind, unsigned flags, void **pointer) {
    Block block = {.size = size, .kind = kind, .flags = flags, .device = card_current()};
    pthread_mutex_lock(&lock);
    MemoryResult result = MEMORY_FULL;
    if (kind == MEM_HOST || charge(&block)) {
        block.base = find_space(round_up(size, PAGE));
        if (block.base && commit(block.base, round_up(size, HOST_PAGE))) {
            add_block(block);
            *pointer = (void *)block.base;
            result = MEMORY_OK;
        } else if (kind == MEM_DEVICE) {
            discharge(&block);
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

MemoryResult card_memory_free(void *pointer, bool host) {
    pthread_mutex_lock(&lock);
    Block *block = containing((uintptr_t)pointer);
    bool known = block && block->base == (uintptr_t)pointer && block->kind == (host ? MEM_HOST : MEM_DEVICE);
    if (known) {
        if (!host) discharge(block);
        drop(block->base, round_up(block->size, HOST_PAGE));
        remove_block(block);
    }
    pthread_mutex_unlock(&lock);
    return known ? MEMORY_OK : MEMORY_INVALID;
}

MemoryResult card_memory_register(void *pointer, size_t size, unsigned flags) {
    pthread_mutex_lock(&lock);
    bool known = containing((uintptr_t)pointer) != NULL;
    if (!known)
        add_block((Block){.base = (uintptr_t)pointer,
                          .size = size,
                          .kind = MEM_REGISTERED,
                          .flags = flags,
                          .device = card_current()});
    pthread_mutex_unlock(&lock);
    return known ? MEMORY_KNOWN : MEMORY_OK;
}

MemoryResult card_memory_unregister(void *pointer) {
    pthread_mutex_lock(&lock);
    Block *block = containing((uintptr_t)pointer);
    bool known = block && block->kind == MEM_REGISTERED && block->base == (uintptr_t)pointer;
    if (known) remove_block(block);
    pthread_mutex_unlock(&lock);
    return known ? MEMORY_OK : MEMORY_INVALID;
}

/* ---- copies ---- */

static bool all_zero(const unsigned char *bytes, size_t size) {
    return !bytes[0] && !memcmp(bytes, bytes + 1, size - 1);
}

static void write_card(unsigned char *to, const unsigned char *from, size_t size) {
    if (to < from + size && from < to + size) {
        memmove(to, from, size);
        return;
    }
    while (size) {
        size_t part = HOST_PAGE - (uintptr_t)to % HOST_PAGE;
        if (part > size) part = size;
        if (part == HOST_PAGE && all_zero(from, part)) {
            if (!all_zero(to, part)) memset(to, 0, part);
        } else {
            memcpy(to, from, part);
        }
        to += part, from += part, size -= part;
    }
}

/* A pointer into the arena must lie, with all that is copied, in one block; others are the host's. */
static bool copyable(const void *pointer, size_t size) {
    Block block;
    uintptr_t at = (uintptr_t)pointer;
    if (card_memory_find(pointer, &block)) return size <= block.size - (at - block.base);
    return pointer && !(arena && at - arena < arena_bytes);
}

/* CARD_COPY_LIMIT bounds what one copy really moves, for models too large for this machine. */
MemoryResult card_memory_copy(void *to, const void *from, size_t size) {
    if (!size) return MEMORY_OK;
    if (!copyable(to, size) || !copyable(from, size)) {
        WARN("copy of %zu bytes from %p to %p: not memory", size, from, to);
        return MEMORY_INVALID;
    }
    static size_t limit;
    if (!limit) limit = card_bytes_of("CARD_COPY_LIMIT", SIZE_MAX);
    if (size > limit) {
        WARN("copy of %zu bytes cut to %zu", size, limit);
        size = limit;
    }
    Block block;
    if (card_memory_find(to, &block)) write_card(to, from, size);
    else memcpy(to, from, size);
    return MEMORY_OK;
}

static void fill_zero(unsigned char *pointer, size_t size) {
    unsigned char *first = (unsigned char *)round_up((uintptr_t)pointer, HOST_PAGE);
    unsigned char *last = (unsigned char *)((uintptr_t)(pointer + size) & ~(uintptr_t)(HOST_PAGE - 1));
    Block block;
    if (last > first && card_memory_find(pointer, &block) && (block.kind == MEM_DEVICE || block.kind == MEM_RESERVED)) {
        memset(pointer, 0, (size_t)(first - pointer));
        madvise(first, (size_t)(last - first), MADV_DONTNEED);
        memset(last, 0, (size_t)(pointer + size - last));
    } else {
        memset(pointer, 0, size);
    }
}

MemoryResult card_memory_set(void *pointer, unsigned value, int width, size_t count) {
    if (!count) return MEMORY_OK;
    if (!copyable(pointer, count * (size_t)width)) return MEMORY_INVALID;
    if (!value) {
        fill_zero(pointer, count * (size_t)width);
        return MEMORY_OK;
    }
    if (count * (size_t)width > FILL_LIMIT) count = FILL_LIMIT / (size_t)width;
    if (width == 1) memset(pointer, (int)value, count);
    for (size_t i = 0; width == 2 && i < count; i++) ((uint16_t *)pointer)[i] = (uint16_t)value;
    for (size_t i = 0; width == 4 && i < count; i++) ((uint32_t *)pointer)[i] = value;
    return MEMORY_OK;
}

/* ---- address space and physical memory apart: what expandable segments use ---- */

MemoryResult card_space_reserve(size_t size, void **pointer) {
    if (!size || size % PAGE) return MEMORY_INVALID;
    pthread_mutex_lock(&lock);
    uintptr_t at = find_space(size);
    if (at) add_block((Block){.base = at, .size = size, .kind = MEM_RESERVED, .device = card_current()});
    pthread_mutex_unlock(&lock);
    *pointer = (void *)at;
    return at ? MEMORY_OK : MEMORY_FULL;
}

MemoryResult card_space_free(void *pointer, size_t size) {
    pthread_mutex_lock(&lock);
    Block *block = containing((uintptr_t)pointer);
    bool known = block && block->kind == MEM_RESERVED && block->base == (uintptr_t)pointer && block->size == size;
    if (known) {
        drop(block->base, block->size);
        remove_block(block);
    }
    pthread_mutex_unlock(&lock);
    return known ? MEMORY_OK : MEMORY_INVALID;
}

MemoryResult card_physical_create(int device, size_t size, Physical **handle) {
    if (!size || size % PAGE) return MEMORY_INVALID;
    if (!card_usage_charge(card_behind(device), size)) return MEMORY_FULL;
    *handle = malloc(sizeof **handle);
    if (!*handle) abort();
    **handle = (Physical){size, device, 1};
    return MEMORY_OK;
}

static void release(Physical *physical) {
    if (--physical->references) return;
    card_usage_release(card_behind(physical->device), physical->size);
    free(physical);
}

void card_physical_release(Physical *handle) {
    pthread_mutex_lock(&lock);
    release(handle);
    pthread_mutex_unlock(&lock);
}

Physical *card_physical_at(const void *pointer) {
    Physical *found = NULL;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < mapping_count && !found; i++)
        if ((uintptr_t)pointer - mappings[i].base < mappings[i].size) found = mappings[i].physical;
    if (found) found->references++;
    pthread_mutex_unlock(&lock);
    return found;
}

MemoryResult card_space_map(void *pointer, size_t size, Physical *handle) {
    pthread_mutex_lock(&lock);
    uintptr_t at = (uintptr_t)pointer;
    Block *block = containing(at);
    bool known = block && block->kind == MEM_RESERVED && size <= block->size - (at - block->base);
    if (known) {
        if (mapping_count == mapping_room) {
            mapping_room = mapping_room ? 2 * mapping_room : 1024;
            mappings = realloc(mappings, mapping_room * sizeof *mappings);
            if (!mappings) abort();
        }
        handle->references++;
        mappings[mapping_count++] = (Mapping){at, size, handle};
    }
    pthread_mutex_unlock(&lock);
    return known ? MEMORY_OK : MEMORY_INVALID;
}

MemoryResult card_space_unmap(void *pointer, size_t size) {
    pthread_mutex_lock(&lock);
    uintptr_t at = (uintptr_t)pointer;
    size_t kept = 0;
    for (size_t i = 0; i < mapping_count; i++) {
        if (mappings[i].base >= at && mappings[i].base < at + size) release(mappings[i].physical);
        else mappings[kept++] = mappings[i];
    }
    bool known = kept < mapping_count;
    mapping_count = kept;
    if (known) drop(at, size);
    pthread_mutex_unlock(&lock);
    return known ? MEMORY_OK : MEMORY_INVALID;
}

MemoryResult card_space_open(void *pointer, size_t size) {
    return commit((uintptr_t)pointer, size) ? MEMORY_OK : MEMORY_INVALID;
}

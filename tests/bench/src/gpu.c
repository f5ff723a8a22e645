/* What the cards are: CARD_GPU describes the model, CARD_COUNT says how many, and CUDA_VISIBLE_DEVICES which
 * of them this process sees. `cards.py` writes the description: "name=...,major=8,minor=0,...".
 */
#include "card.h"

#include <stdlib.h>
#include <string.h>

static Gpu gpu;
static int count, visible[MAX_CARDS], visible_count;

static const struct { const char *key; size_t *value; } figures[] = {
    {"major", &gpu.major},
    {"minor", &gpu.minor},
    {"code_version", &gpu.code_version},
    {"multiprocessors", &gpu.multiprocessors},
    {"capacity", &gpu.capacity},
    {"context", &gpu.context},
    {"l2", &gpu.l2},
    {"shared", &gpu.shared},
    {"block_shared", &gpu.block_shared},
    {"threads", &gpu.threads},
    {"blocks", &gpu.blocks},
    {"fp64_ratio", &gpu.fp64_ratio},
    {"clock_khz", &gpu.clock_khz},
    {"memory_clock_khz", &gpu.memory_clock_khz},
    {"bus_bits", &gpu.bus_bits},
};

static void fail(const char *what, const char *text) {
    fprintf(stderr, "simulated-card: %s: %s\n", what, text);
    exit(2);
}

static void describe(char *text) {
    char *rest;
    for (char *field = strtok_r(text, ",", &rest); field; field = strtok_r(NULL, ",", &rest)) {
        char *value = strchr(field, '=');
        if (!value) fail("not a figure of a card", field);
        *value++ = 0;
        if (!strcmp(field, "name")) {
            snprintf(gpu.name, sizeof gpu.name, "%s", value);
            continue;
        }
        size_t i = 0, known = sizeof figures / sizeof *figures;
        while (i < known && strcmp(figures[i].key, field)) i++;
        if (i == known) fail("not a figure of a card", field);
        *figures[i].value = strtoull(value, NULL, 10);
    }
}

/* CUDA_VISIBLE_DEVICES ends at the first entry that is no card, as CUDA's does. */
static void choose_visible(void) {
    const char *wanted = getenv("CUDA_VISIBLE_DEVICES");
    if (!wanted) {
        for (visible_count = 0; visible_count < count; visible_count++) visible[visible_count] = visible_count;
        return;
    }
    char text[1024], *rest;
    snprintf(text, sizeof text, "%s", wanted);
    for (char *entry = strtok_r(text, ",", &rest); entry && visible_count < count; entry = strtok_r(NULL, ",", &rest)) {
        int card = -1;
        char uuid[UUID_TEXT], *end;
        for (int i = 0; i < count; i++) {
            card_uuid_text(i, uuid);
            if (!strncmp(entry, "GPU-", 4) && !strncmp(uuid, entry, strlen(entry))) card = i;
        }
        long number = strtol(entry, &end, 10);
        if (end != entry && !*end && number >= 0 && number < count) card = (int)number;
        if (card < 0) break;
        visible[visible_count++] = card;
    }
}

__attribute__((constructor)) static void read_environment(void) {
    const char *text = getenv("CARD_GPU"), *cards = getenv("CARD_COUNT");
    if (!text || !*text) return; /* whoever asks for the card is told */
    char *copy = strdup(text);
    describe(copy);
    free(copy);
    gpu.capacity = card_bytes_of("CARD_CAPACITY", gpu.capacity);
    gpu.context = card_bytes_of("CARD_CONTEXT", gpu.context);
    count = cards && *cards ? atoi(cards) : 1;
    if (count < 1 || count > MAX_CARDS) fail("not a number of cards", cards);
    choose_visible();
}

const Gpu *card_gpu(void) {
    if (!gpu.capacity) fail("CARD_GPU describes no card", "start the program with python -m tests.bench");
    return &gpu;
}

int card_count(void) { return card_gpu() ? count : 0; }
int card_visible_count(void) { return card_gpu() ? visible_count : 0; }
int card_behind(int device) { return device >= 0 && device < visible_count ? visible[device] : -1; }

size_t card_bytes_of(const char *variable, size_t otherwise) {
    const char *text = getenv(variable);
    if (!text || !*text) return otherwise;
    char *unit;
    double number = strtod(text, &unit);
    if (*unit == 'K') number *= 1024.0;
    if (*unit == 'M') number *= 1024.0 * 1024;
    if (*unit == 'G') number *= 1024.0 * 1024 * 1024;
    return (size_t)number;
}

/* Blocks of a kernel that fit one multiprocessor. */
int card_occupancy(int block_threads, size_t shared_bytes, int registers) {
    const Gpu *g = card_gpu();
    int warps = (block_threads + 31) / 32;
    if (block_threads <= 0 || block_threads > 1024 || shared_bytes > g->block_shared) return 0;
    size_t shared = (shared_bytes + RESERVED_SHARED(g) + 127) / 128 * 128;
    int warp_registers = (registers * 32 + 255) / 256 * 256;
    int limits[] = {
        (int)g->blocks,
        (int)g->threads / 32 / warps,
        shared ? (int)(g->shared / shared) : (int)g->blocks,
        warp_registers ? REGISTERS_OF_SM / warp_registers / warps : (int)g->blocks,
    };
    int least = limits[0];
    for (size_t i = 1; i < sizeof limits / sizeof *limits; i++)
        if (limits[i] < least) least = limits[i];
    return least;
}

void card_uuid(int card, unsigned char uuid[16]) {
    memcpy(uuid, "simulated card ", 15);
    uuid[15] = (unsigned char)card;
}

void card_uuid_text(int card, char text[UUID_TEXT]) {
    unsigned char u[16];
    card_uuid(card, u);
    snprintf(text, UUID_TEXT, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1],
             u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
}

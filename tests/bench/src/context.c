/* Which device a thread uses, and the context that a process has on it: opened once, never in a child that
 * was forked from a process with a context, as on a card.
 */
#include "card.h"

static enum { CLOSED, OPEN, FORKED } contexts[MAX_CARDS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current;

int card_current(void) { return current; }
void card_make_current(int device) { current = device; }

static void after_fork(void) {
    pthread_mutex_init(&lock, NULL);
    for (int i = 0; i < MAX_CARDS; i++)
        if (contexts[i] == OPEN) contexts[i] = FORKED;
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }

MemoryResult card_context_open(int device) {
    int card = card_behind(device);
    if (card < 0) return MEMORY_INVALID;
    if (contexts[device] == OPEN) return MEMORY_OK;
    if (contexts[device] == FORKED) return MEMORY_DEAD;
    pthread_mutex_lock(&lock);
    if (contexts[device] == CLOSED && card_usage_charge(card, card_gpu()->context)) contexts[device] = OPEN;
    pthread_mutex_unlock(&lock);
    return contexts[device] == OPEN ? MEMORY_OK : MEMORY_FULL;
}

bool card_context_is_open(int device) { return card_behind(device) >= 0 && contexts[device] == OPEN; }

/* How many bytes of each card each process holds.
 *
 * CARD_SHARE names a file that all processes of one run map: they share the cards, as real
 * processes do. Without it a process has the cards for itself.
 */
#include "card.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLOTS 64
typedef struct { atomic_int pid; atomic_size_t bytes[MAX_CARDS]; } Slot;
static Slot private_slots[SLOTS], *slots = private_slots;
static Slot *mine;
static size_t countdown, room[MAX_CARDS], held[MAX_CARDS]; /* room: what may be in use, 0 for all */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void after_fork(void) {
    mine = NULL;
    pthread_mutex_init(&lock, NULL);
}

__attribute__((constructor)) static void open_share(void) {
    pthread_atfork(NULL, NULL, after_fork);
    card_full_at(card_bytes_of("CARD_FULL_AT", 0));
    const char *path = getenv("CARD_SHARE");
    if (!path || !*path) return;
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) return;
    if (!ftruncate(file, sizeof private_slots)) {
        void *map = mmap(NULL, sizeof private_slots, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (map != MAP_FAILED) slots = map;
    }
    close(file);
}

static void empty(Slot *slot) {
    for (int card = 0; card < MAX_CARDS; card++) slot->bytes[card] = 0;
}

/* Free the slots of processes that ended. */
static void sweep(void) {
    for (int i = 0; i < SLOTS; i++) {
        int pid = slots[i].pid;
        if (pid && pid != getpid() && kill(pid, 0) && errno == ESRCH) {
            empty(&slots[i]);
            slots[i].pid = 0;
        }
    }
}

static Slot *my_slot(void) {
    if (mine) return mine;
    sweep();
    for (int i = 0; i < SLOTS && !mine; i++) {
        int nobody = 0;
        if (atomic_compare_exchange_strong(&slots[i].pid, &nobody, getpid())) {
            empty(&slots[i]);
            mine = &slots[i];
        }
    }
    if (!mine) {
        fprintf(stderr, "simulated-card: more than %d processes\n", SLOTS);
        abort();
    }
    return mine;
}

size_t card_usage_total(int card) {
    size_t total = 0;
    sweep();
    for (int i = 0; i < SLOTS; i++) total += slots[i].pid ? slots[i].bytes[card] : 0;
    return total;
}

bool card_usage_charge(int card, size_t bytes) {
    pthread_mutex_lock(&lock);
    Slot *slot = my_slot();
    size_t used = card_usage_total(card);
    if (countdown && !--countdown) room[card] = used > held[card] ? used : held[card];
    bool fits = used + bytes <= (room[card] ? room[card] : card_gpu()->capacity);
    if (fits) slot->bytes[card] += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}

void card_usage_release(int card, size_t bytes) {
    pthread_mutex_lock(&lock);
    my_slot()->bytes[card] -= bytes;
    pthread_mutex_unlock(&lock);
}

/* When this process asks for memory for the n-th time from now, the card that it asks is full: others have taken all
 * but what is in use then, or now if that is more. 0 gives the memory back. */
void card_full_at(size_t n) {
    pthread_mutex_lock(&lock);
    for (int card = 0; card < MAX_CARDS; card++) {
        room[card] = 0;
        held[card] = card_usage_total(card);
    }
    countdown = n;
    pthread_mutex_unlock(&lock);
}

int card_usage_processes(int card, int room, int *pids, size_t *bytes) {
    int count = 0;
    sweep();
    for (int i = 0; i < SLOTS; i++) {
        if (!slots[i].pid || !slots[i].bytes[card]) continue;
        if (count < room) {
            pids[count] = slots[i].pid;
            bytes[count] = slots[i].bytes[card];
        }
        count++;
    }
    return count;
}

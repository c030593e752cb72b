/* Threads that share work: they and who calls take what is left of it until nothing is. Between two calls they look out for the next one for
 * a moment before they sleep: to wake a thread takes as long as many a kernel. */

typedef void (*work)(void *job, float *scratch, long widest);

/* A thread of a team, with memory of its own. */
typedef struct {
    struct team *team;
    float *scratch;
    pthread_t thread;
} member;

typedef struct team {
    pthread_mutex_t lock;
    pthread_cond_t called;
    long asleep, calls, ended; /* threads; so many; threads, of the last one */
#ifdef __linux__
    int here; /* the processor of who called last */
    cpu_set_t processors;
#endif
    work what; /* none: it is over */
    void *job;
    long widest, others;
    member each[];
} team;

#define LOOKOUT 3000 /* glances, a few tens of microseconds in all */

INLINE void glance(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

INLINE void wait_for(const long *counter, long value) {
    for (long glances = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; glances++) {
        if (glances < LOOKOUT) glance();
        else sched_yield();
    }
}

static void *belong(void *to) {
    const member *own = to;
    team *of = own->team;
    for (long seen = 0;;) {
        for (int glances = 0; __atomic_load_n(&of->calls, __ATOMIC_ACQUIRE) == seen && glances < LOOKOUT; glances++) glance();
        if (__atomic_load_n(&of->calls, __ATOMIC_ACQUIRE) == seen) {
            pthread_mutex_lock(&of->lock);
            of->asleep++;
            while (of->calls == seen) pthread_cond_wait(&of->called, &of->lock);
            of->asleep--;
            pthread_mutex_unlock(&of->lock);
        }
        seen++;
        if (!of->what) return 0;
        of->what(of->job, own->scratch, of->widest);
        __atomic_fetch_add(&of->ended, 1, __ATOMIC_RELEASE);
    }
}

/* Keeps the others off the processor of who calls: where the system wakes a thread there, both take turns for milliseconds. */
static void stand_aside(team *of) {
#ifdef __linux__
    const int here = sched_getcpu();
    cpu_set_t others = of->processors;
    if (here < 0 || here == of->here) return;
    of->here = here;
    CPU_CLR(here, &others);
    if (!CPU_COUNT(&others)) return;
    for (long i = 0; i < of->others; i++) pthread_setaffinity_np(of->each[i].thread, sizeof others, &others);
#endif
}

static void call(team *of, work what) {
    of->what = what;
    pthread_mutex_lock(&of->lock);
    __atomic_fetch_add(&of->calls, 1, __ATOMIC_RELEASE);
    if (of->asleep) pthread_cond_broadcast(&of->called);
    pthread_mutex_unlock(&of->lock);
}

/* Ends the threads. */
void team_close(team *of) {
    call(of, 0);
    for (long i = 0; i < of->others; i++) pthread_join(of->each[i].thread, 0);
    pthread_mutex_destroy(&of->lock);
    pthread_cond_destroy(&of->called);
    free(of);
}

/* So many threads beside who calls, each with its own of the ``scratch``; none where the system gives no more. */
team *team_open(long others, float **scratch) {
    team *of = calloc(1, sizeof(team) + others * sizeof(member));
    if (!of) return 0;
    pthread_mutex_init(&of->lock, 0);
    pthread_cond_init(&of->called, 0);
#ifdef __linux__
    of->here = -1;
    sched_getaffinity(0, sizeof of->processors, &of->processors);
#endif
    for (; of->others < others; of->others++) {
        member *next = of->each + of->others;
        next->team = of, next->scratch = scratch[of->others];
        if (pthread_create(&next->thread, 0, belong, next)) {
            team_close(of);
            return 0;
        }
    }
    return of;
}

/* Does a job with all of them; scratch: the caller's own. One call at a time. */
void team_run(team *of, work what, void *job, float *scratch, long widest) {
    of->job = job, of->widest = widest, of->ended = 0;
    stand_aside(of);
    call(of, what);
    what(job, scratch, widest);
    wait_for(&of->ended, of->others);
}

/*
 * A program that exports functions of QEMU's names and calls them as often as it is told.
 *
 * Reads lines "COUNT RATE" from stdin: COUNT times lock and unlock, RATE times a second (0: as fast
 * as can be), the call number as the line.  Then appends to the file named by its argument, for each
 * call, the CLOCK_MONOTONIC times before and after it, and prints "done".
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static pthread_mutex_t bql = PTHREAD_MUTEX_INITIALIZER;

__attribute__((noinline)) void qemu_mutex_lock_impl(void *mutex, const char *file, int line)
{
    (void)file;
    (void)line;
    pthread_mutex_lock(mutex);
}

__attribute__((noinline)) void bql_lock_impl(const char *file, int line)
{
    qemu_mutex_lock_impl(&bql, file, line);
    __asm__ volatile("");
}

__attribute__((noinline)) void bql_unlock(void)
{
    pthread_mutex_unlock(&bql);
    __asm__ volatile("");
}

__attribute__((noinline)) void qemu_cond_wait_impl(void *cond, void *mutex)
{
    __asm__ volatile("" : : "r"(cond), "r"(mutex));
}

__attribute__((noinline)) void qemu_cond_timedwait_impl(void *cond, void *mutex)
{
    __asm__ volatile("" : : "r"(cond), "r"(mutex));
}

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(int argc, char **argv)
{
    unsigned count, rate;

    while (argc == 2 && scanf("%u %u", &count, &rate) == 2) {
        uint64_t (*times)[2] = calloc(count, sizeof *times);
        uint64_t start = now();
        FILE *log = fopen(argv[1], "ab");

        for (unsigned i = 0; i < count; i++) {
            while (rate && now() < start + i * 1000000000ull / rate) {
            }
            times[i][0] = now();
            bql_lock_impl("../util/target.c", i);
            bql_unlock();
            times[i][1] = now();
        }
        fwrite(times, sizeof *times, count, log);
        fclose(log);
        free(times);
        puts("done");
        fflush(stdout);
    }
    return 0;
}

/* Preloaded before the interposer: a host so busy that who waits for a millisecond gets the processor
 * again after 60. */
#include <linux/futex.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <time.h>

static long raw(long n, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;

    __asm__ volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8),
                     "r"(r9) : "rcx", "r11", "memory");
    return result;
}

extern int *__errno_location(void);

long syscall(long n, ...)
{
    static const struct timespec late = {0, 60000000};
    long a[6];
    va_list values;

    va_start(values, n);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(values, long);
    va_end(values);
    if (n == SYS_futex && (a[1] & 127) == FUTEX_WAIT && a[3])
        nanosleep(&late, 0);
    long result = raw(n, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (result < 0 && result > -4096) {
        *__errno_location() = -result;
        return -1;
    }
    return result;
}

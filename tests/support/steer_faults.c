/* Preloaded before the interposer, so that this is what the interposer calls: an ioctl that refuses.
 *
 * STEER_FAULTS names a file of two uint32_t.  The first: the how manieth add of a memslot from now is
 * refused (ENOMEM); it counts down to 0, and 0 refuses none.  The second: a capability that KVM does
 * not have.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static _Atomic uint32_t *faults;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("STEER_FAULTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *at = fd < 0 ? MAP_FAILED : mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (at != MAP_FAILED)
        faults = at;
    if (fd >= 0)
        close(fd);
}

static int refuses(const struct kvm_userspace_memory_region *r)
{
    uint32_t left = faults && r->memory_size ? atomic_load(&faults[0]) : 0;

    return left && atomic_fetch_sub(&faults[0], 1) == 1;
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list values;

    va_start(values, request);
    void *argument = va_arg(values, void *);
    va_end(values);
    if (request == KVM_SET_USER_MEMORY_REGION && refuses(argument)) {
        errno = ENOMEM;
        return -1;
    }
    if (request == KVM_CHECK_EXTENSION && faults && faults[1] &&
        (uintptr_t)argument == atomic_load(&faults[1]))
        return 0;
    return syscall(SYS_ioctl, fd, request, argument);
}

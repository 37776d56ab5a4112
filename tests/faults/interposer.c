/* Stands between a program and its file system (LD_PRELOAD): counts and logs the operations that
 * change anything below one folder, and at a chosen one kills the processes, or has the disk full.
 *
 * Nothing happens until faults_arm() is called, in a process that is to be watched; those that it
 * forks are watched with it, and share the count. The log has a line for each operation, written
 * before it takes place: number, name, size of the file or length, path (and the new path of a
 * rename). What glibc itself writes for fwrite() cannot be seen: fwrite() counts as a write.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL_ALL = 1, KILL_ONE = 2, FULL_ONCE = 3, FULL_FOR_GOOD = 4 };

static char root[PATH_MAX];
static int log_descriptor = -1, what, victim;
static long at;
static long *count; /* shared with the processes that are forked */

/* Looked up once: a fork may happen while another thread holds the loader's lock. */
#define REAL(name)                                                                                \
    ({                                                                                            \
        static __typeof__(name) *real;                                                            \
        if (!real)                                                                                \
            real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name);                                   \
        real;                                                                                     \
    })

void faults_arm(const char *folder, int log, int kind, long number, int pid) {
    count = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    *count = 0;
    what = kind, at = number, victim = pid, log_descriptor = log;
    strcpy(root, folder);
}

static int is_below(const char *path) {
    size_t length = strlen(root);
    return count && strncmp(path, root, length) == 0 && path[length] == '/';
}

/* The path of a name relative to a folder, in a buffer of PATH_MAX. */
static const char *absolute(int folder, const char *name, char *buffer) {
    char start[PATH_MAX];
    ssize_t length;
    if (name[0] == '/')
        return name;
    if (folder == AT_FDCWD) {
        if (!getcwd(start, sizeof start))
            return "";
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, start, sizeof start - 1);
        if (length < 0)
            return "";
        start[length] = 0;
    }
    snprintf(buffer, PATH_MAX, "%.*s/%.*s", PATH_MAX / 2 - 2, start, PATH_MAX / 2 - 2, name);
    return buffer;
}

static const char *path_of(int descriptor, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = count ? readlink(link, buffer, PATH_MAX - 1) : -1;
    if (length < 0)
        return "";
    buffer[length] = 0;
    return buffer;
}

/* True where the disk is full for this operation. */
static int meets(const char *name, long size, const char *path, const char *to, int needs_space) {
    char line[2 * PATH_MAX + 64];
    if (!is_below(path) && !(to && is_below(to)))
        return 0;
    int before = errno;
    long number = __sync_add_and_fetch(count, 1);
    int length = snprintf(line, sizeof line, "%ld\t%s\t%ld\t%s\t%s\n", number, name, size, path,
                          to ? to : "");
    syscall(SYS_write, log_descriptor, line, (size_t)length);
    if (number == at && what == KILL_ALL)
        kill(0, SIGKILL);
    if (number == at && what == KILL_ONE) {
        kill(victim, SIGKILL);
        kill(getpid(), SIGKILL);
    }
    errno = before;
    int full = needs_space && ((what == FULL_ONCE && number == at) ||
                               (what == FULL_FOR_GOOD && number >= at));
    if (full)
        errno = ENOSPC;
    return full;
}

static long size_of(int descriptor) {
    struct stat found;
    return fstat(descriptor, &found) == 0 ? (long)found.st_size : -1;
}

static long size_of_path(const char *path) {
    struct stat found;
    return stat(path, &found) == 0 ? (long)found.st_size : -1;
}

/* The size of a file that is opened; -1 of one that is made. Only what may change a file counts. */
static int opens(int folder, const char *name, int flags) {
    char buffer[PATH_MAX];
    if (!count || !(flags & (O_CREAT | O_TRUNC)))
        return 0;
    const char *path = absolute(folder, name, buffer);
    long size = size_of_path(path);
    return meets(flags & O_TRUNC ? "empty" : "open", size, path, NULL, size < 0);
}

#define OPEN(function, folder, call)                                                              \
    va_list more;                                                                                 \
    va_start(more, flags);                                                                        \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                       \
    va_end(more);                                                                                 \
    if (opens(folder, name, flags))                                                               \
        return -1;                                                                                \
    return call

int open(const char *name, int flags, ...) { OPEN(open, AT_FDCWD, REAL(open)(name, flags, mode)); }
int open64(const char *name, int flags, ...) {
    OPEN(open64, AT_FDCWD, REAL(open64)(name, flags, mode));
}
int openat(int folder, const char *name, int flags, ...) {
    OPEN(openat, folder, REAL(openat)(folder, name, flags, mode));
}
int openat64(int folder, const char *name, int flags, ...) {
    OPEN(openat64, folder, REAL(openat64)(folder, name, flags, mode));
}

/* As disks fill up: a part is taken, and then nothing more. */
ssize_t write(int descriptor, const void *data, size_t length) {
    char buffer[PATH_MAX];
    if (count && meets("write", size_of(descriptor), path_of(descriptor, buffer), NULL, 1)) {
        if (length < 2 || what == FULL_ONCE)
            return -1;
        return REAL(write)(descriptor, data, length / 2);
    }
    return REAL(write)(descriptor, data, length);
}

ssize_t pwrite64(int descriptor, const void *data, size_t length, off64_t offset) {
    char buffer[PATH_MAX];
    if (count && meets("write", size_of(descriptor), path_of(descriptor, buffer), NULL, 1))
        return -1;
    return REAL(pwrite64)(descriptor, data, length, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int number) {
    char buffer[PATH_MAX];
    if (count && meets("write", size_of(descriptor), path_of(descriptor, buffer), NULL, 1))
        return -1;
    return REAL(writev)(descriptor, parts, number);
}

size_t fwrite(const void *data, size_t size, size_t number, FILE *file) {
    char buffer[PATH_MAX];
    int descriptor = fileno(file);
    if (count && descriptor >= 0 &&
        meets("write", size_of(descriptor), path_of(descriptor, buffer), NULL, 1))
        return 0;
    return REAL(fwrite)(data, size, number, file);
}

int fsync(int descriptor) {
    char buffer[PATH_MAX];
    if (count && meets("sync", size_of(descriptor), path_of(descriptor, buffer), NULL, 0))
        return -1;
    return REAL(fsync)(descriptor);
}

int ftruncate64(int descriptor, off64_t length) {
    char buffer[PATH_MAX];
    if (count)
        meets("cut", length, path_of(descriptor, buffer), NULL, 0);
    return REAL(ftruncate64)(descriptor, length);
}

int rename(const char *from, const char *to) {
    char one[PATH_MAX], two[PATH_MAX];
    if (count)
        meets("rename", -1, absolute(AT_FDCWD, from, one), absolute(AT_FDCWD, to, two), 0);
    return REAL(rename)(from, to);
}

int unlink(const char *name) {
    char buffer[PATH_MAX];
    if (count)
        meets("remove", -1, absolute(AT_FDCWD, name, buffer), NULL, 0);
    return REAL(unlink)(name);
}

int unlinkat(int folder, const char *name, int flags) {
    char buffer[PATH_MAX];
    if (count)
        meets("remove", -1, absolute(folder, name, buffer), NULL, 0);
    return REAL(unlinkat)(folder, name, flags);
}

int rmdir(const char *name) {
    char buffer[PATH_MAX];
    if (count)
        meets("remove", -1, absolute(AT_FDCWD, name, buffer), NULL, 0);
    return REAL(rmdir)(name);
}

int mkdir(const char *name, mode_t mode) {
    char buffer[PATH_MAX];
    if (count && meets("folder", -1, absolute(AT_FDCWD, name, buffer), NULL, 1))
        return -1;
    return REAL(mkdir)(name, mode);
}

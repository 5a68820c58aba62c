/* A preloaded library that makes the disk fail at the Nth file-changing call of a process, or moves its clock.

   Rule: dormant until `fault_arm` is called, and then only for the process that called it and for paths below `root`;
   a child that it forks is left alone. What was there before is taken to be safe on the disk.

   It sees what goes through the C library's names: Python, libstdc++ (which torch.save writes with, by fopen and writev)
   and safetensors do. Not seen: a call inside the C library (fflush of a FILE), and the rename from `.tmpXXXXXX` inside
   the unfinished folder at the end of safetensors' save_file, which its Rust makes without the C library. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { WRITE = 1, CREATE = 2, SYNC = 4, NAME = 8, REMOVE = 16, CUT = 32 };
#define NEEDS_SPACE (WRITE | CREATE | SYNC) /* a late allocation shows at fsync */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static volatile pid_t armed; /* the process, 0 while dormant */
static char root[PATH_MAX], lost[PATH_MAX];
static size_t root_length;
static long at, count;
static int report = -1;
static int kills, tears, drops_data, drops_names, fails_with, fails_once, failing_kinds;
static volatile long clock_offset_s;

/* --- what is not yet safe on the disk, for the modes `power` and `power_names` ----------------------------------- */

#define MOST 4096

static struct dirty { /* a file with data that no fsync has reached */
    dev_t device;
    ino_t inode;
    int handle;  /* O_PATH, so that it is found under any name */
    off_t keep;  /* bytes from the start that were safe before */
} dirty[MOST];
static int num_dirty;

static struct change { /* a name whose folder no fsync has reached */
    dev_t device;
    ino_t inode;               /* of the folder with the new name */
    int folder, old_folder;    /* O_PATH; old_folder -1 if the name was created, not moved */
    char name[256], old_name[256];
    int replaced;              /* what stood there is kept under this number in `lost`, 0 if nothing did */
} changes[MOST];
static int num_changes, num_lost;

static void fail(const char *what) {
    dprintf(2, "fault_shim: %s (errno %d)\n", what, errno);
    syscall(SYS_exit_group, 99);
}

static void drop_dirty(int i) {
    syscall(SYS_close, dirty[i].handle);
    dirty[i] = dirty[--num_dirty];
}

/* From `offset` on, the file behind `fd` is not safe. */
static void note_data(int fd, off_t offset) {
    struct stat s;
    char link[64];
    if (!drops_data || fstat(fd, &s) || !S_ISREG(s.st_mode)) return;
    if (offset < 0) offset = lseek(fd, 0, SEEK_CUR);
    if ((fcntl(fd, F_GETFL) & O_APPEND) || offset > s.st_size) offset = s.st_size;
    for (int i = 0; i < num_dirty; i++)
        if (dirty[i].device == s.st_dev && dirty[i].inode == s.st_ino) {
            if (offset < dirty[i].keep) dirty[i].keep = offset;
            return;
        }
    if (num_dirty == MOST) fail("too many files without fsync");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int handle = syscall(SYS_openat, AT_FDCWD, link, O_PATH | O_CLOEXEC, 0);
    if (handle < 0) fail("no handle of a file");
    dirty[num_dirty++] = (struct dirty){s.st_dev, s.st_ino, handle, offset};
}

/* The data of a file, or the names in a folder, are safe now. */
static void note_sync(int fd) {
    struct stat s;
    if (fstat(fd, &s)) return;
    for (int i = num_dirty - 1; i >= 0; i--)
        if (dirty[i].device == s.st_dev && dirty[i].inode == s.st_ino) drop_dirty(i);
    int kept = 0;
    for (int i = 0; i < num_changes; i++) {
        if (changes[i].device == s.st_dev && changes[i].inode == s.st_ino) {
            syscall(SYS_close, changes[i].folder);
            if (changes[i].old_folder >= 0) syscall(SYS_close, changes[i].old_folder);
        } else
            changes[kept++] = changes[i];
    }
    num_changes = kept;
}

/* A handle of the folder that `path` lies in; its last part goes to `name`. */
static int folder_of(const char *path, char *name) {
    char parent[PATH_MAX];
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    snprintf(name, 256, "%s", slash + 1);
    *slash = 0;
    return syscall(SYS_openat, AT_FDCWD, *parent ? parent : "/", O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
}

static int is_there(const char *path) {
    struct stat s;
    return !lstat(path, &s);
}

static void lost_name(char *path, int number) {
    snprintf(path, PATH_MAX + 32, "%s/%d", lost, number);
}

/* Keep what stands under `path`, which a rename is about to replace. Returns its number, 0 if there is nothing. */
static int keep_replaced(const char *path) {
    char copy[PATH_MAX + 32];
    if (!drops_names || !is_there(path)) return 0;
    lost_name(copy, ++num_lost);
    return syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, copy, 0) ? 0 : num_lost;
}

/* The name `path` is new; it was `old_path` before, or nothing. */
static void note_name(const char *path, const char *old_path, int old_folder, int replaced) {
    struct stat s;
    if (!drops_names) return;
    if (num_changes == MOST) fail("too many names without fsync");
    struct change *change = &changes[num_changes++];
    memset(change, 0, sizeof *change);
    change->folder = folder_of(path, change->name);
    if (change->folder < 0 || fstat(change->folder, &s)) fail("no handle of a folder");
    change->device = s.st_dev, change->inode = s.st_ino;
    change->old_folder = old_folder, change->replaced = replaced;
    if (old_path) snprintf(change->old_name, 256, "%s", strrchr(old_path, '/') + 1);
}

/* What the disk holds after the current has gone: removed names stay removed. */
static void cut_power(void) {
    char link[64], place[PATH_MAX + 32];
    for (int i = 0; i < num_dirty; i++) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dirty[i].handle);
        int fd = syscall(SYS_openat, AT_FDCWD, link, O_WRONLY, 0);
        if (fd < 0 || syscall(SYS_ftruncate, fd, dirty[i].keep)) fail("a file cannot be cut");
    }
    for (int i = num_changes - 1; i >= 0; i--) {
        struct change *c = &changes[i];
        lost_name(place, ++num_lost);
        if (c->old_folder >= 0)
            syscall(SYS_renameat, c->folder, c->name, c->old_folder, c->old_name);
        else
            syscall(SYS_renameat, c->folder, c->name, AT_FDCWD, place);
        lost_name(place, c->replaced);
        if (c->replaced) syscall(SYS_renameat, AT_FDCWD, place, c->folder, c->name);
    }
}

/* --- arming and counting ------------------------------------------------------------------------------------------ */

static int error_number(const char *name) {
    if (!strcmp(name, "ENOSPC")) return ENOSPC;
    if (!strcmp(name, "EDQUOT")) return EDQUOT;
    if (!strcmp(name, "EIO")) return EIO;
    if (!strcmp(name, "EROFS")) return EROFS;
    return 0;
}

/* From now on, `mode` strikes at the `number`th call below `folder`; each counted call is a line of `report_path`.

   Returns 0, or -1 for a mode that is not known. */
int fault_arm(const char *folder, const char *mode, long number, const char *report_path) {
    char name[32];
    snprintf(name, sizeof name, "%s", mode);
    char *suffix = strstr(name, "_once");
    if ((fails_once = suffix != NULL)) *suffix = 0;
    drops_names = !strcmp(name, "power_names");
    drops_data = drops_names || !strcmp(name, "power");
    tears = !strcmp(name, "torn");
    kills = tears || drops_data || !strcmp(name, "kill");
    fails_with = error_number(name);
    failing_kinds = fails_with == ENOSPC || fails_with == EDQUOT ? NEEDS_SPACE : ~0;
    if (!kills && !fails_with && strcmp(name, "count")) return -1;
    if (!realpath(folder, root)) fail("no such root");
    root_length = strlen(root);
    snprintf(lost, sizeof lost, "%.4000s.lost", root);
    if (drops_names) syscall(SYS_mkdirat, AT_FDCWD, lost, 0700);
    report = syscall(SYS_openat, AT_FDCWD, report_path, O_CREAT | O_TRUNC | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
    if (report < 0) fail("no report");
    at = number, count = 0;
    armed = getpid();
    return 0;
}

void fault_disarm(void) { armed = 0; }

/* Move the wall clock of this process, and of those that it forks, by so many seconds. */
void fault_clock(long offset_s) { clock_offset_s = offset_s; }

static int is_armed(void) { return armed && armed == getpid(); }

static int is_below(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* The absolute form of `path`; returns whether it lies below the root. */
static int resolve(int folder, const char *path, char *out) {
    char link[64];
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return is_below(out);
    }
    if (folder == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = syscall(SYS_readlink, link, out, PATH_MAX - 1);
    if (n < 0) return 0;
    snprintf(out + n, PATH_MAX - n, *path ? "/%s" : "%s", path);
    return is_below(out);
}

static int of_descriptor(int fd, char *out) {
    out[0] = 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlink, link, out, PATH_MAX - 1);
    if (n < 0) return 0;
    out[n] = 0;
    return is_below(out);
}

static void say(const char *call, const char *path, const char *what) {
    char line[2 * PATH_MAX];
    int n = snprintf(line, sizeof line, "%ld %s %s%s\n", count, call, path + root_length, what);
    syscall(SYS_write, report, line, n);
}

static void die(void) {
    if (drops_data) cut_power();
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* Count a call that is about to be made; returns 0, or the errno that it must fail with. Holds the lock from here. */
static int enter(enum kind kind, const char *call, const char *path) {
    pthread_mutex_lock(&lock);
    count++;
    int fails = fails_with && (fails_once ? count == at : count >= at) && (kind & failing_kinds);
    int dies = kills && count == at;
    say(call, path, fails || dies ? " <- hit" : "");
    if (dies && !(tears && kind == WRITE)) die();
    return fails ? fails_with : 0;
}

static void leave(void) {
    int kept = errno;
    pthread_mutex_unlock(&lock);
    errno = kept;
}

static int refuse(int error) {
    leave();
    errno = error;
    return -1;
}

#define TEARS_NOW (tears && count == at)
#define REAL(name, type) \
    static __typeof__(type) real; \
    if (!real) real = (__typeof__(type))dlsym(RTLD_NEXT, name)

/* --- data ---------------------------------------------------------------------------------------------------------- */

ssize_t write(int fd, const void *data, size_t size) {
    REAL("write", ssize_t (*)(int, const void *, size_t));
    char path[PATH_MAX];
    if (!is_armed() || !of_descriptor(fd, path)) return real(fd, data, size);
    int error = enter(WRITE, "write", path);
    if (error) return refuse(error);
    note_data(fd, -1);
    ssize_t done = real(fd, data, TEARS_NOW ? size / 2 : size);
    if (TEARS_NOW) die();
    leave();
    return done;
}

static ssize_t positioned(ssize_t (*real)(int, const void *, size_t, off_t), int fd, const void *data, size_t size,
                          off_t offset) {
    char path[PATH_MAX];
    if (!is_armed() || !of_descriptor(fd, path)) return real(fd, data, size, offset);
    int error = enter(WRITE, "pwrite", path);
    if (error) return refuse(error);
    note_data(fd, offset);
    ssize_t done = real(fd, data, TEARS_NOW ? size / 2 : size, offset);
    if (TEARS_NOW) die();
    leave();
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    REAL("pwrite", ssize_t (*)(int, const void *, size_t, off_t));
    return positioned(real, fd, data, size, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL("pwrite64", ssize_t (*)(int, const void *, size_t, off_t));
    return positioned(real, fd, data, size, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int num) {
    REAL("writev", ssize_t (*)(int, const struct iovec *, int));
    char path[PATH_MAX];
    if (!is_armed() || !of_descriptor(fd, path)) return real(fd, parts, num);
    int error = enter(WRITE, "writev", path);
    if (error) return refuse(error);
    note_data(fd, -1);
    if (TEARS_NOW) {
        size_t size = 0;
        for (int i = 0; i < num; i++) size += parts[i].iov_len;
        size /= 2;
        for (int i = 0; i < num && size; i++) {
            size_t part = parts[i].iov_len < size ? parts[i].iov_len : size;
            syscall(SYS_write, fd, parts[i].iov_base, part);
            size -= part;
        }
        die();
    }
    ssize_t done = real(fd, parts, num);
    leave();
    return done;
}

static ssize_t positioned_v(ssize_t (*real)(int, const struct iovec *, int, off_t), int fd, const struct iovec *parts,
                            int num, off_t offset) {
    char path[PATH_MAX];
    if (!is_armed() || !of_descriptor(fd, path)) return real(fd, parts, num, offset);
    int error = enter(WRITE, "pwritev", path);
    if (error) return refuse(error);
    note_data(fd, offset);
    if (TEARS_NOW) {
        if (num) syscall(SYS_pwrite64, fd, parts[0].iov_base, parts[0].iov_len / 2, offset);
        die();
    }
    ssize_t done = real(fd, parts, num, offset);
    leave();
    return done;
}

ssize_t pwritev(int fd, const struct iovec *parts, int num, off_t offset) {
    REAL("pwritev", ssize_t (*)(int, const struct iovec *, int, off_t));
    return positioned_v(real, fd, parts, num, offset);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int num, off64_t offset) {
    REAL("pwritev64", ssize_t (*)(int, const struct iovec *, int, off_t));
    return positioned_v(real, fd, parts, num, offset);
}

static ssize_t sent(ssize_t (*real)(int, int, off_t *, size_t), int out, int in, off_t *offset, size_t size) {
    char path[PATH_MAX];
    struct stat s;
    if (!is_armed() || !of_descriptor(out, path)) return real(out, in, offset, size);
    int error = enter(WRITE, "sendfile", path);
    if (error) return refuse(error);
    note_data(out, -1);
    if (TEARS_NOW) {
        if (!fstat(in, &s) && (size_t)s.st_size < size) size = s.st_size;
        real(out, in, offset, size / 2);
        die();
    }
    ssize_t done = real(out, in, offset, size);
    leave();
    return done;
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    REAL("sendfile", ssize_t (*)(int, int, off_t *, size_t));
    return sent(real, out, in, offset, size);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    REAL("sendfile64", ssize_t (*)(int, int, off_t *, size_t));
    return sent(real, out, in, offset, size);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL("copy_file_range", ssize_t (*)(int, off64_t *, int, off64_t *, size_t, unsigned));
    char path[PATH_MAX];
    if (!is_armed() || !of_descriptor(out, path)) return real(in, from, out, to, size, flags);
    int error = enter(WRITE, "copy_file_range", path);
    if (error) return refuse(error);
    note_data(out, to ? *to : -1);
    ssize_t done = real(in, from, out, to, TEARS_NOW ? size / 2 : size, flags);
    if (TEARS_NOW) die();
    leave();
    return done;
}

/* Writes through a map are not seen one by one: the file counts as written from its start. */
static void *mapped(void *(*real)(void *, size_t, int, int, int, off_t), void *place, size_t size, int protection,
                    int flags, int fd, off_t offset) {
    char path[PATH_MAX];
    int writes = fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE);
    if (!writes || !is_armed() || !of_descriptor(fd, path)) return real(place, size, protection, flags, fd, offset);
    int error = enter(WRITE, "mmap", path);
    if (error) return refuse(error), MAP_FAILED;
    if (TEARS_NOW) die();
    note_data(fd, 0);
    void *done = real(place, size, protection, flags, fd, offset);
    leave();
    return done;
}

void *mmap(void *place, size_t size, int protection, int flags, int fd, off_t offset) {
    REAL("mmap", void *(*)(void *, size_t, int, int, int, off_t));
    return mapped(real, place, size, protection, flags, fd, offset);
}

void *mmap64(void *place, size_t size, int protection, int flags, int fd, off64_t offset) {
    REAL("mmap64", void *(*)(void *, size_t, int, int, int, off_t));
    return mapped(real, place, size, protection, flags, fd, offset);
}

#define TRUNCATE(name) \
    int name(int fd, off_t length) { \
        REAL(#name, int (*)(int, off_t)); \
        char path[PATH_MAX]; \
        if (!is_armed() || !of_descriptor(fd, path)) return real(fd, length); \
        int error = enter(CUT, "ftruncate", path); \
        if (error) return refuse(error); \
        note_data(fd, length); \
        int done = real(fd, length); \
        leave(); \
        return done; \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define TRUNCATE_PATH(name) \
    int name(const char *file, off_t length) { \
        REAL(#name, int (*)(const char *, off_t)); \
        char path[PATH_MAX]; \
        if (!is_armed() || !resolve(AT_FDCWD, file, path)) return real(file, length); \
        int error = enter(CUT, "truncate", path); \
        if (error) return refuse(error); \
        int fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0); \
        if (fd >= 0) note_data(fd, length), syscall(SYS_close, fd); \
        int done = real(file, length); \
        leave(); \
        return done; \
    }
TRUNCATE_PATH(truncate)
TRUNCATE_PATH(truncate64)

#define ALLOCATE(name, parameters, arguments) \
    int name parameters { \
        REAL(#name, int (*) parameters); \
        char path[PATH_MAX]; \
        if (!is_armed() || !of_descriptor(fd, path)) return real arguments; \
        int error = enter(WRITE, #name, path); \
        if (error) return refuse(error), !strncmp(#name, "posix", 5) ? error : -1; \
        if (TEARS_NOW) die(); \
        note_data(fd, offset); \
        int done = real arguments; \
        leave(); \
        return done; \
    }
ALLOCATE(fallocate, (int fd, int mode, off_t offset, off_t size), (fd, mode, offset, size))
ALLOCATE(fallocate64, (int fd, int mode, off64_t offset, off64_t size), (fd, mode, offset, size))
ALLOCATE(posix_fallocate, (int fd, off_t offset, off_t size), (fd, offset, size))
ALLOCATE(posix_fallocate64, (int fd, off64_t offset, off64_t size), (fd, offset, size))

#define FLUSH(name) \
    int name(int fd) { \
        REAL(#name, int (*)(int)); \
        char path[PATH_MAX]; \
        if (!is_armed() || !of_descriptor(fd, path)) return real(fd); \
        int error = enter(SYNC, #name, path); \
        if (error) return refuse(error); \
        int done = real(fd); \
        if (!done) note_sync(fd); \
        leave(); \
        return done; \
    }
FLUSH(fsync)
FLUSH(fdatasync)

/* --- opening ------------------------------------------------------------------------------------------------------- */

static int opened(int (*real)(int, const char *, int, mode_t), const char *call, int folder, const char *file,
                  int flags, mode_t mode) {
    char path[PATH_MAX];
    int unnamed = (flags & O_TMPFILE) == O_TMPFILE;
    if (!is_armed() || unnamed || !(flags & (O_CREAT | O_TRUNC)) || !resolve(folder, file, path))
        return real(folder, file, flags, mode);
    int is_new = !is_there(path);
    if (is_new && !(flags & O_CREAT)) return real(folder, file, flags, mode);
    int error = enter(is_new ? CREATE : CUT, call, path);
    if (error) return refuse(error);
    int fd = real(folder, file, flags, mode);
    if (fd >= 0 && is_new) note_name(path, NULL, -1, 0);
    if (fd >= 0 && !is_new && (flags & O_TRUNC)) note_data(fd, 0);
    leave();
    return fd;
}

static mode_t mode_of(int flags, va_list rest) {
    return flags & (O_CREAT | __O_TMPFILE) ? (mode_t)va_arg(rest, int) : 0;
}

#define OPEN(name) \
    static int name##_at(int folder, const char *file, int flags, mode_t mode) { \
        REAL(#name, int (*)(const char *, int, ...)); \
        (void)folder; \
        return real(file, flags, mode); \
    } \
    int name(const char *file, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        return opened(name##_at, "open", AT_FDCWD, file, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    static int name##_at(int folder, const char *file, int flags, mode_t mode) { \
        REAL(#name, int (*)(int, const char *, int, ...)); \
        return real(folder, file, flags, mode); \
    } \
    int name(int folder, const char *file, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        return opened(name##_at, "open", folder, file, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

int creat(const char *file, mode_t mode) { return open(file, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *file, mode_t mode) { return open64(file, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* What compilers put for an open without a mode where sources are fortified. */
int __open_2(const char *file, int flags) { return open(file, flags, 0); }
int __open64_2(const char *file, int flags) { return open64(file, flags, 0); }

static FILE *opened_stream(FILE *(*real)(const char *, const char *), const char *file, const char *mode) {
    char path[PATH_MAX];
    if (!is_armed() || !(*mode == 'w' || *mode == 'a') || !resolve(AT_FDCWD, file, path)) return real(file, mode);
    int is_new = !is_there(path);
    int error = enter(is_new ? CREATE : CUT, "fopen", path);
    if (error) return refuse(error), NULL;
    FILE *stream = real(file, mode);
    if (stream && is_new) note_name(path, NULL, -1, 0);
    if (stream && !is_new && *mode == 'w') note_data(fileno(stream), 0);
    leave();
    return stream;
}

FILE *fopen(const char *file, const char *mode) {
    REAL("fopen", FILE *(*)(const char *, const char *));
    return opened_stream(real, file, mode);
}

FILE *fopen64(const char *file, const char *mode) {
    REAL("fopen64", FILE *(*)(const char *, const char *));
    return opened_stream(real, file, mode);
}

/* --- names --------------------------------------------------------------------------------------------------------- */

int renameat2(int old_folder, const char *old, int new_folder, const char *new, unsigned flags) {
    char path[PATH_MAX], old_path[PATH_MAX], name[256];
    int ours = is_armed() && resolve(old_folder, old, old_path) + resolve(new_folder, new, path);
    if (!ours) return syscall(SYS_renameat2, old_folder, old, new_folder, new, flags);
    int error = enter(NAME, "rename", path);
    if (error) return refuse(error);
    int replaced = keep_replaced(path), handle = drops_names ? folder_of(old_path, name) : -1;
    int done = syscall(SYS_renameat2, old_folder, old, new_folder, new, flags);
    if (!done) note_name(path, old_path, handle, replaced);
    leave();
    return done;
}

int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    return renameat2(old_folder, old, new_folder, new, 0);
}

int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int folder, const char *file, int flags) {
    char path[PATH_MAX];
    int ours = is_armed() && resolve(folder, file, path) && is_there(path);
    if (!ours) return syscall(SYS_unlinkat, folder, file, flags);
    int error = enter(REMOVE, flags & AT_REMOVEDIR ? "rmdir" : "unlink", path);
    if (error) return refuse(error);
    int done = syscall(SYS_unlinkat, folder, file, flags);
    leave();
    return done;
}

int unlink(const char *file) { return unlinkat(AT_FDCWD, file, 0); }
int rmdir(const char *file) { return unlinkat(AT_FDCWD, file, AT_REMOVEDIR); }
int remove(const char *file) {
    int done = unlinkat(AT_FDCWD, file, 0);
    return done && errno == EISDIR ? unlinkat(AT_FDCWD, file, AT_REMOVEDIR) : done;
}

/* A name that is there already changes nothing, and tells so before a disk could fail. */
#define NEW_NAME(call, folder, file, make) \
    do { \
        char path[PATH_MAX]; \
        if (!is_armed() || !resolve(folder, file, path) || is_there(path)) return make; \
        int error = enter(CREATE, call, path); \
        if (error) return refuse(error); \
        int done = make; \
        if (!done) note_name(path, NULL, -1, 0); \
        leave(); \
        return done; \
    } while (0)

int mkdirat(int folder, const char *file, mode_t mode) {
    NEW_NAME("mkdir", folder, file, syscall(SYS_mkdirat, folder, file, mode));
}
int mkdir(const char *file, mode_t mode) { return mkdirat(AT_FDCWD, file, mode); }

int symlinkat(const char *target, int folder, const char *file) {
    NEW_NAME("symlink", folder, file, syscall(SYS_symlinkat, target, folder, file));
}
int symlink(const char *target, const char *file) { return symlinkat(target, AT_FDCWD, file); }

int linkat(int old_folder, const char *old, int folder, const char *file, int flags) {
    NEW_NAME("link", folder, file, syscall(SYS_linkat, old_folder, old, folder, file, flags));
}
int link(const char *old, const char *file) { return linkat(AT_FDCWD, old, AT_FDCWD, file, 0); }

/* --- the clock; the kernel's time stamps on files stay true -------------------------------------------------------- */

int clock_gettime(clockid_t id, struct timespec *now) {
    REAL("clock_gettime", int (*)(clockid_t, struct timespec *));
    int done = real(id, now);
    if (!done && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += clock_offset_s;
    return done;
}

int gettimeofday(struct timeval *now, void *zone) {
    REAL("gettimeofday", int (*)(struct timeval *, void *));
    int done = real(now, zone);
    if (!done) now->tv_sec += clock_offset_s;
    return done;
}

time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}

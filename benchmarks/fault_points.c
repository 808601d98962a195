// Numbers the calls with which a process changes or opens files below some
// folders, and disturbs one of them. Loaded with LD_PRELOAD, so that libraries
// in C++ are seen too; idle until `fault_arm` is called.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { OFF, COUNT, FAIL, FULL, KILL, SNAPSHOT };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int mode, wanted, inside, count, log_fd = -1;
static char root[PATH_MAX], part[PATH_MAX], snapshots[PATH_MAX];

// Errors that fit a call, the second one for odd numbers.
static const struct {
  const char *kind;
  int errors[2];
} kinds[] = {
    {"read", {EACCES, EIO}},     {"open", {ENOSPC, EACCES}},
    {"write", {ENOSPC, EIO}},    {"fsync", {EIO, ENOSPC}},
    {"truncate", {EIO, ENOSPC}}, {"rename", {EACCES, EIO}},
    {"link", {ENOSPC, EACCES}},  {"mkdir", {ENOSPC, EACCES}},
    {"unlink", {EACCES, EIO}},   {"rmdir", {EACCES, EIO}},
};

// Starts or ends (mode OFF) the numbering of calls below a root, inside or
// outside of a part of it. A line per call goes to `log`: number, kind, error
// and path.
void fault_arm(int new_mode, int new_wanted, int new_inside,
               const char *new_root, const char *new_part, const char *log,
               const char *new_snapshots) {
  pthread_mutex_lock(&lock);
  mode = new_mode, wanted = new_wanted, inside = new_inside, count = 0;
  snprintf(root, sizeof root, "%s", new_root);
  snprintf(part, sizeof part, "%s", new_part);
  snprintf(snapshots, sizeof snapshots, "%s", new_snapshots);
  if (log_fd >= 0) close(log_fd);
  log_fd = mode ? syscall(SYS_openat, AT_FDCWD, log,
                          O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666)
                : -1;
  pthread_mutex_unlock(&lock);
}

static void find(int folder, const char *path, char *found) {
  char base[PATH_MAX] = "", link[64];
  if (!path || path[0] != '/') {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    ssize_t size = readlink(link, base, sizeof base - 2);
    base[size < 0 ? 0 : size] = 0;
    if (path) strcat(base, "/");
  }
  snprintf(found, PATH_MAX, "%s%s", base, path ? path : "");
}

static void copy(int number) {
  char to[PATH_MAX + 16];
  snprintf(to, sizeof to, "%s/%d", snapshots, number);
  char *arguments[] = {"cp", "-a", root, to, NULL}, *none[] = {NULL};
  pid_t child;
  int status;
  if (!posix_spawn(&child, "/bin/cp", NULL, NULL, arguments, none))
    waitpid(child, &status, 0);
}

// Takes a number for a call. Returns the error that it shall end with, 0 if
// none. `size` is that of a write, of which half is done first.
static int point(const char *kind, int folder, const char *path, int fd,
                 const char *content, size_t size) {
  if (!mode) return 0;
  int before = errno, error = 0, kept = 0;
  char place[PATH_MAX], line[PATH_MAX + 99];
  find(folder, path, place);
  size_t length = strlen(root);
  if (strncmp(place, root, length) || (place[length] && place[length] != '/'))
    return errno = before, 0;
  int is_inside = !strncmp(place, part, strlen(part));
  if (is_inside != inside) return errno = before, 0;
  pthread_mutex_lock(&lock);
  int number = ++count, hit = number == wanted;
  if (mode == FULL)
    hit = number >= wanted && strchr("owtlm", kind[0]);  // What takes room.
  if (mode == SNAPSHOT || (hit && mode != COUNT)) {
    if (size > 1) kept = syscall(SYS_write, fd, content, size / 2);
    if (mode == SNAPSHOT) copy(number);
    if (hit && mode == FAIL)
      for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kind, kinds[i].kind)) error = kinds[i].errors[number & 1];
    if (hit && mode == FULL) error = ENOSPC;
  }
  if (mode && (mode == COUNT || mode == SNAPSHOT || hit)) {
    int n = snprintf(line, sizeof line, "%d %s %d %s\n", number, kind, error,
                     place + length);
    if (log_fd >= 0 && syscall(SYS_write, log_fd, line, n) < 0) abort();
  }
  if (hit && mode == KILL) kill(getpid(), SIGKILL), pause();
  pthread_mutex_unlock(&lock);
  errno = before;
  return error ? error : -kept;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// Defines a function that is a point; `call` are its arguments.
#define POINT(type, name, parameters, call, kind, folder, path)      \
  type name parameters {                                             \
    int error = point(kind, folder, path, -1, NULL, 0);              \
    return error > 0 ? (errno = error, -1) : REAL(name) call;        \
  }

#define OPEN(name, parameters, call, folder)                         \
  int name parameters {                                              \
    va_list rest;                                                    \
    va_start(rest, flags);                                           \
    int rights = va_arg(rest, int);                                  \
    va_end(rest);                                                    \
    int reads = (flags & (O_ACCMODE | O_CREAT)) == O_RDONLY;         \
    int error = point(reads ? "read" : "open", folder, path, -1, NULL, 0); \
    return error > 0 ? (errno = error, -1) : REAL(name) call;        \
  }

#define IN int at, const char *path
OPEN(open, (const char *path, int flags, ...), (path, flags, rights), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, rights),
     AT_FDCWD)
OPEN(openat, (IN, int flags, ...), (at, path, flags, rights), at)
OPEN(openat64, (IN, int flags, ...), (at, path, flags, rights), at)

FILE *fopen64(const char *path, const char *how) {
  int error = point(how[0] == 'r' && !strchr(how, '+') ? "read" : "open",
                    AT_FDCWD, path, -1, NULL, 0);
  return error > 0 ? (errno = error, NULL) : REAL(fopen64)(path, how);
}
FILE *fopen(const char *path, const char *how) { return fopen64(path, how); }

ssize_t write(int fd, const void *content, size_t size) {
  int error = point("write", fd, NULL, fd, content, size);
  if (error > 0) return errno = error, -1;
  ssize_t rest = REAL(write)(fd, content - error, size + error);
  return rest < 0 ? rest : rest - error;
}

#define VECTORS int fd, const struct iovec *parts, int number
POINT(ssize_t, writev, (VECTORS), (fd, parts, number), "write", fd, NULL)
POINT(ssize_t, pwrite64, (int fd, const void *c, size_t n, off_t o),
      (fd, c, n, o), "write", fd, NULL)
POINT(ssize_t, pwritev64v2, (VECTORS, off_t o, int flags),
      (fd, parts, number, o, flags), "write", fd, NULL)
POINT(ssize_t, sendfile64, (int fd, int in, off_t *o, size_t n),
      (fd, in, o, n), "write", fd, NULL)
POINT(int, fsync, (int fd), (fd), "fsync", fd, NULL)
POINT(int, fdatasync, (int fd), (fd), "fsync", fd, NULL)
POINT(int, ftruncate, (int fd, off_t n), (fd, n), "truncate", fd, NULL)
POINT(int, ftruncate64, (int fd, off_t n), (fd, n), "truncate", fd, NULL)

POINT(int, rename, (const char *from, const char *to), (from, to), "rename",
      AT_FDCWD, to)
POINT(int, renameat, (int a, const char *from, int b, const char *to),
      (a, from, b, to), "rename", b, to)
POINT(int, link, (const char *from, const char *to), (from, to), "link",
      AT_FDCWD, to)
POINT(int, linkat, (int a, const char *from, int b, const char *to, int flags),
      (a, from, b, to, flags), "link", b, to)
POINT(int, mkdir, (const char *path, mode_t rights), (path, rights), "mkdir",
      AT_FDCWD, path)
POINT(int, mkdirat, (IN, mode_t rights), (at, path, rights), "mkdir", at, path)
POINT(int, unlink, (const char *path), (path), "unlink", AT_FDCWD, path)
POINT(int, unlinkat, (IN, int flags), (at, path, flags), "unlink", at, path)
POINT(int, rmdir, (const char *path), (path), "rmdir", AT_FDCWD, path)

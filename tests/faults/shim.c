/* Loaded with LD_PRELOAD: records every write, rename, fsync and mkdir below a folder, and lets one fail, or be the last
   thing that the process does. For Linux. The memory that holds its state is shared by all forks of a process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static struct state {
    char below[4096];     /* only paths that begin with this count; none if it is empty */
    char what[4096];      /* the operation to disturb, as it is recorded; empty disturbs none */
    long time;            /* the how manieth of these, from 1 */
    int error;            /* it fails with this errno, as does every later operation */
    int signal;           /* or the process gets this signal in the middle of it */
    int done;             /* it has happened */
    pid_t process;        /* only in this process */
    long used;            /* bytes of the record */
    char record[1 << 20]; /* a line an operation: "rename /path" */
} *state;

__attribute__((constructor)) static void begin(void) {
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void fault_arm(const char *below, const char *what, long time, int error, int signal) {
    memset(state, 0, sizeof *state);
    strncpy(state->below, below, sizeof state->below - 1);
    strncpy(state->what, what, sizeof state->what - 1);
    state->time = time, state->error = error, state->signal = signal, state->process = getpid();
}

const char *fault_record(void) { return state->record; }

/* 0: go on; 1: fail; 2: die */
static int disturbed(const char *operation, const char *path) {
    if (!state->below[0] || state->process != getpid() || strncmp(path, state->below, strlen(state->below))) return 0;
    char line[4200];
    snprintf(line, sizeof line, "%s %s", operation, path);
    long room = sizeof state->record - 1 - state->used;
    int added = snprintf(state->record + state->used, room, "%s\n", line);
    state->used += added < room ? added : 0;
    if (state->done) return state->error ? (errno = state->error, 1) : 0;
    if (strcmp(line, state->what) || --state->time) return 0;
    state->done = 1;
    return state->error ? (errno = state->error, 1) : 2;
}

static void die(void) { kill(getpid(), state->signal); }

static int disturbed_file(const char *operation, int file) {
    if (!state->below[0]) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return disturbed(operation, path);
}

static int disturbed_name(const char *operation, const char *name) {
    char here[2048], path[4096];
    if (name[0] == '/') return disturbed(operation, name);
    if (!getcwd(here, sizeof here) || snprintf(path, sizeof path, "%s/%s", here, name) >= (int)sizeof path) return 0;
    return disturbed(operation, path);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

ssize_t write(int file, const void *bytes, size_t size) {
    REAL(write);
    size_t half = size / 2;
    switch (disturbed_file("write", file)) {
    case 1: return -1;
    case 2: real(file, bytes, half); die(); return half + real(file, (const char *)bytes + half, size - half);
    }
    return real(file, bytes, size);
}

int fsync(int file) {
    REAL(fsync);
    switch (disturbed_file("fsync", file)) {
    case 1: return -1;
    case 2: die();
    }
    return real(file);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    switch (disturbed_name("rename", to)) {
    case 1: return -1;
    case 2: die();
    }
    return real(from, to);
}

int mkdir(const char *name, mode_t mode) {
    REAL(mkdir);
    switch (disturbed_name("mkdir", name)) {
    case 1: return -1;
    case 2: die();
    }
    return real(name, mode);
}

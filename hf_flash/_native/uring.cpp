// io_uring for hf_flash: many positional reads with few system calls and no Python per read.
//
// One ring per reader. A batch is what was submitted together; its reads go into the submission queue as far as the
// depth allows, the others wait in line and follow as reads complete. Whoever waits for a batch reaps for all: one
// waiter at a time sleeps in the kernel (the leader), the others on a condition variable, so no completion is lost between
// them; the call that it sleeps in also submits what moved up. Short reads go on where they stopped; EINTR and EAGAIN are
// tried again. Raw system calls, no liburing.
//
// Several threads share a ring, so it is set up without SINGLE_ISSUER and DEFER_TASKRUN. A ring may be `prompt` or not.
// If it is not (COOP_TASKRUN), no thread is interrupted for each read that lands: reads are known to have landed once the
// thread that submitted them enters the kernel, or at the next tick of its core's clock if another thread waits for them.
// Sparse steps submit, compute and wait on one thread, and save a fifth of what their reads cost it.
//
// Who wants to go on at once when reads land, though all callers are computing, sets a watch (the stream does): a thread
// of the ring's own is woken by the kernel and calls it.
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <vector>

#include "calls.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <thread>

namespace {

constexpr unsigned MAX_FILES = 64;     // registered with a ring
constexpr size_t MAX_READ = 1u << 30;  // what one call reads is capped near 2 GiB anyway; the rest goes on as a short read

// A thread that is woken when reads land, and whom it tells.
struct Watcher {
  struct Watch {
    void (*call)(void *);
    void *who;
  };

  std::mutex mutex;  // held while somebody is told
  std::vector<Watch> watches;
  int event = -1;
  bool ends = false;
  std::thread thread;

  ~Watcher() {
    if (event >= 0) close(event);
  }

  void run() {
    be_prompt();
    uint64_t n;
    while (read(event, &n, sizeof n) == sizeof n || errno == EINTR) {
      std::lock_guard<std::mutex> hold(mutex);
      if (ends) return;
      for (const Watch &watch : watches) watch.call(watch.who);
    }
  }

  void forget() {  // nobody is told any more
    std::lock_guard<std::mutex> hold(mutex);
    watches.clear();
  }

  void end() {
    {
      std::lock_guard<std::mutex> hold(mutex);
      ends = true;
    }
    const uint64_t one = 1;
    if (write(event, &one, sizeof one) == sizeof one) thread.join();
    else thread.detach();
  }

  // Ask for short turns, which come soon, where the cores are busy (Linux 6.12 and later; no harm before).
  static void be_prompt() {
#if defined(SYS_sched_setattr) && defined(SYS_sched_getattr)
    struct {
      uint32_t size, policy;
      uint64_t flags;
      int32_t nice;
      uint32_t priority;
      uint64_t runtime, deadline, period;
    } attr;
    std::memset(&attr, 0, sizeof attr);
    if (syscall(SYS_sched_getattr, 0, &attr, sizeof attr, 0)) return;
    attr.runtime = 100000;  // ns
    syscall(SYS_sched_setattr, 0, &attr, 0);
#endif
  }
};

struct Batch;

struct Op {
  Batch *batch;
  int fd;
  int64_t offset, want, need, got = 0;
  std::vector<iovec> iov;  // where it goes
  size_t done = 0;         // how many of them are full
};

struct Batch {
  std::deque<Op> ops;  // the kernel has pointers to them: they stay where they are
  int64_t left = 0;
  int error = 0;           // errno of the first read that failed; ENODATA where the file ended early
  int error_fd = -1;
  int64_t error_offset = 0, error_got = 0, error_want = 0;
};

struct Ring {
  int fd = -1;
  unsigned depth = 0, in_flight = 0;
  unsigned *sq_flags, *sq_head, *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
  io_uring_sqe *sqes;
  io_uring_cqe *cqes;
  void *sq_map = MAP_FAILED, *cq_map = MAP_FAILED, *sqe_map = MAP_FAILED;
  size_t sq_size = 0, cq_size = 0, sqe_size = 0;
  std::mutex mutex;
  std::condition_variable reaped;
  bool leader = false;
  bool plain_read = false;  // IORING_OP_READ is known (Linux 5.6): no vector to copy in for a read into one buffer
  std::deque<Op *> line;  // reads that found no room in the queue
  std::vector<int> files;   // what the kernel knows without looking it up for every read, by its number there
  size_t most_files = 0;    // that it takes
  std::shared_ptr<Watcher> watcher;  // null until somebody watches

  int enter(unsigned submit, unsigned wait) {
    return static_cast<int>(
        syscall(__NR_io_uring_enter, fd, submit, wait, wait ? IORING_ENTER_GETEVENTS : 0u, nullptr, 0));
  }

  // The number that the kernel has for a file; -1 where it takes no more.
  int number_of(int file) {
    const auto known = std::find(files.begin(), files.end(), file);
    const int number = static_cast<int>(known - files.begin());
    if (known != files.end()) return number;
    if (files.size() >= most_files) return -1;
    io_uring_files_update update{};
    update.offset = static_cast<uint32_t>(number);
    update.fds = reinterpret_cast<uint64_t>(&file);
    if (syscall(__NR_io_uring_register, fd, IORING_REGISTER_FILES_UPDATE, &update, 1) != 1) {
      most_files = 0;  // not asked again for every read
      return -1;
    }
    files.push_back(file);
    return number;
  }

  void push(Op *op) {
    const unsigned tail = *sq_tail, index = tail & *sq_mask;
    io_uring_sqe *sqe = &sqes[index];
    std::memset(sqe, 0, sizeof *sqe);
    const iovec *iov = &op->iov[op->done];
    const size_t n = op->iov.size() - op->done;
    const bool one = plain_read && n == 1 && iov->iov_len <= MAX_READ;
    sqe->opcode = one ? IORING_OP_READ : IORING_OP_READV;
    const int number = number_of(op->fd);
    sqe->fd = number < 0 ? op->fd : number;
    sqe->flags = number < 0 ? 0 : IOSQE_FIXED_FILE;
    sqe->off = static_cast<uint64_t>(op->offset + op->got);
    sqe->addr = reinterpret_cast<uint64_t>(one ? iov->iov_base : iov);
    sqe->len = static_cast<uint32_t>(one ? iov->iov_len : n);
    sqe->user_data = reinterpret_cast<uint64_t>(op);
    sq_array[index] = index;
    __atomic_store_n(sq_tail, tail + 1, __ATOMIC_RELEASE);
  }

  void finish(Op *op, int error) {
    Batch *b = op->batch;
    if (error && !b->error) {
      b->error = error;
      b->error_fd = op->fd;
      b->error_offset = op->offset;
      b->error_got = op->got;
      b->error_want = op->need;
    }
    b->left--;
  }

  void advance() {  // with the mutex: move reads from the line into the queue
    while (!line.empty() && in_flight < depth) {
      push(line.front());
      line.pop_front();
      in_flight++;
    }
  }

  // One read a call: of several the kernel holds the first back until the last is prepared, and the device idles
  // meanwhile, a sixth of its reads/s at a depth of 16 (benchmarks/reads.py).
  //
  // `together`: all in one call. The device is told of them once, which costs less than to be told of each where a virtual
  // machine has to stop for it.
  void flush(bool together = false) {  // what the kernel has no room for now stays queued; the leader's next call takes it along
    while (queued() && (enter(together ? queued() : 1, 0) >= 0 || errno == EINTR)) {
    }
  }

  // Submit what is queued and sleep until `wait` reads are complete; may return before that.
  int sleep(unsigned wait) {
    for (unsigned left = queued(); left > 1; left--) {
      if (enter(1, 0) != 1) return enter(queued(), 1);  // no room, or another thread submitted it
    }
    const unsigned left = queued();
    return enter(left, left > 1 ? 1 : wait);
  }

  // Completions worth sleeping for. One would wake us for every read; more than a few of a deep queue and it runs dry.
  unsigned patience(const Batch *b) const {
    const unsigned few = in_flight / 8;
    return few < 1 ? 1 : b->left < static_cast<int64_t>(few) ? static_cast<unsigned>(b->left) : few;
  }

  bool landed() const { return *cq_head != __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE); }

  unsigned queued() const { return __atomic_load_n(sq_tail, __ATOMIC_RELAXED) - __atomic_load_n(sq_head, __ATOMIC_ACQUIRE); }

  void complete(Op *op, int result) {
    in_flight--;
    if (result == -EINTR || result == -EAGAIN) return line.push_front(op);
    if (result < 0) return finish(op, -result);
    op->got += result;
    if (op->got >= op->want) return finish(op, 0);
    if (result == 0 || result % 512) return finish(op, op->got >= op->need ? 0 : ENODATA);  // the end of the file
    size_t n = static_cast<size_t>(result);
    while (n >= op->iov[op->done].iov_len) n -= op->iov[op->done++].iov_len;
    iovec &first = op->iov[op->done];
    first.iov_base = static_cast<char *>(first.iov_base) + n;
    first.iov_len -= n;
    line.push_front(op);
  }

  void reap() {  // with the mutex
#ifdef IORING_SQ_TASKRUN
    if (__atomic_load_n(sq_flags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN)  // of a ring that is not prompt
      syscall(__NR_io_uring_enter, fd, 0, 0, IORING_ENTER_GETEVENTS, nullptr, 0);
#endif
    unsigned head = *cq_head;
    const unsigned tail = __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE);
    while (head != tail) {
      const io_uring_cqe &cqe = cqes[head & *cq_mask];
      complete(reinterpret_cast<Op *>(cqe.user_data), cqe.res);
      head++;
    }
    __atomic_store_n(cq_head, head, __ATOMIC_RELEASE);
    advance();
  }

  void start(Batch *b, std::vector<Op> &&ops, bool together = false) {
    std::lock_guard<std::mutex> hold(mutex);
    b->left += static_cast<int64_t>(ops.size());
    for (Op &op : ops) {
      b->ops.push_back(std::move(op));
      line.push_back(&b->ops.back());
    }
    if (!leader) reap();  // a leader may sleep until the very completion that would be taken here
    else advance();
    flush(together);
  }

  // The thread that tells who watches; null where the system does not let us have it.
  std::shared_ptr<Watcher> watched() {
    std::lock_guard<std::mutex> hold(mutex);
    if (watcher) return watcher;
    std::shared_ptr<Watcher> made = std::make_shared<Watcher>();
    made->event = eventfd(0, EFD_CLOEXEC);
    if (made->event < 0 || syscall(__NR_io_uring_register, fd, IORING_REGISTER_EVENTFD, &made->event, 1)) return nullptr;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // Ctrl-C is for others
    try {
      Watcher *one = made.get();
      made->thread = std::thread([one] { one->run(); });
      pthread_setname_np(made->thread.native_handle(), "hf_flash-ring");
      watcher = made;
    } catch (const std::system_error &) {
      syscall(__NR_io_uring_register, fd, IORING_UNREGISTER_EVENTFD, nullptr, 0);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return watcher;
  }
};

void *map(int fd, size_t size, off_t what) {
  return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
}

}  // namespace

extern "C" {

void hf_flash_ring_close(void *handle) {
  Ring *r = static_cast<Ring *>(handle);
  if (r->watcher) r->watcher->forget();  // whoever watches starts no reads from here on
  {
    std::lock_guard<std::mutex> hold(r->mutex);  // what is in flight writes into memory that is not ours to free
    while (r->fd >= 0 && r->cq_map != MAP_FAILED && (r->in_flight || !r->line.empty())) {
      r->enter(r->queued(), 1);
      r->reap();
    }
  }
  if (r->watcher) r->watcher->end();  // now, not before: the kernel cancels what a thread that ends has started
  if (r->sqe_map != MAP_FAILED) munmap(r->sqe_map, r->sqe_size);
  if (r->cq_map != MAP_FAILED && r->cq_map != r->sq_map) munmap(r->cq_map, r->cq_size);
  if (r->sq_map != MAP_FAILED) munmap(r->sq_map, r->sq_size);
  if (r->fd >= 0) close(r->fd);
  delete r;
}

// A ring for `depth` reads in flight; null and errno where the kernel or a sandbox refuses. Who watches it, or waits for
// what other threads submit, wants it prompt.
void *hf_flash_ring_open(unsigned depth, int prompt) {
  Ring *r = new Ring;
  io_uring_params p;
  std::memset(&p, 0, sizeof p);
#ifdef IORING_SQ_TASKRUN
  if (!prompt) {
    p.flags = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    r->fd = static_cast<int>(syscall(__NR_io_uring_setup, depth, &p));
    if (r->fd < 0) std::memset(&p, 0, sizeof p);  // Linux before 5.19
  }
#endif
  if (r->fd < 0) r->fd = static_cast<int>(syscall(__NR_io_uring_setup, depth, &p));
  if (r->fd < 0) {
    delete r;
    return nullptr;
  }
  r->depth = depth < p.sq_entries ? depth : p.sq_entries;
  r->plain_read = p.features & IORING_FEAT_RW_CUR_POS;  // came with IORING_OP_READ
  r->sq_size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
  r->cq_size = p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe);
  if (p.features & IORING_FEAT_SINGLE_MMAP) r->sq_size = r->cq_size = r->sq_size > r->cq_size ? r->sq_size : r->cq_size;
  r->sqe_size = p.sq_entries * sizeof(io_uring_sqe);
  r->sq_map = map(r->fd, r->sq_size, IORING_OFF_SQ_RING);
  r->cq_map = p.features & IORING_FEAT_SINGLE_MMAP ? r->sq_map : map(r->fd, r->cq_size, IORING_OFF_CQ_RING);
  r->sqe_map = map(r->fd, r->sqe_size, IORING_OFF_SQES);
  if (r->sq_map == MAP_FAILED || r->cq_map == MAP_FAILED || r->sqe_map == MAP_FAILED) {
    hf_flash_ring_close(r);
    return nullptr;
  }
  char *sq = static_cast<char *>(r->sq_map), *cq = static_cast<char *>(r->cq_map);
  r->sq_head = reinterpret_cast<unsigned *>(sq + p.sq_off.head);
  r->sq_flags = reinterpret_cast<unsigned *>(sq + p.sq_off.flags);
  r->sq_tail = reinterpret_cast<unsigned *>(sq + p.sq_off.tail);
  r->sq_mask = reinterpret_cast<unsigned *>(sq + p.sq_off.ring_mask);
  r->sq_array = reinterpret_cast<unsigned *>(sq + p.sq_off.array);
  r->cq_head = reinterpret_cast<unsigned *>(cq + p.cq_off.head);
  r->cq_tail = reinterpret_cast<unsigned *>(cq + p.cq_off.tail);
  r->cq_mask = reinterpret_cast<unsigned *>(cq + p.cq_off.ring_mask);
  r->cqes = reinterpret_cast<io_uring_cqe *>(cq + p.cq_off.cqes);
  r->sqes = static_cast<io_uring_sqe *>(r->sqe_map);
  const std::vector<int> none(MAX_FILES, -1);
  if (!syscall(__NR_io_uring_register, r->fd, IORING_REGISTER_FILES, none.data(), MAX_FILES)) r->most_files = MAX_FILES;
  return r;
}

// Start n reads: read i fills buffers first[i] .. first[i + 1] from offsets[i] of fds[i].
void *hf_flash_ring_submit(void *handle, int64_t n, const int *fds, const int64_t *offsets, const int64_t *need,
                           const int64_t *first, const uint64_t *addresses, const int64_t *lengths) {
  Batch *b = new Batch;
  std::vector<Op> ops;
  ops.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; i++) {
    Op op{b, fds[i], offsets[i], 0, need[i]};
    for (int64_t k = first[i]; k < first[i + 1]; k++) {
      op.iov.push_back(iovec{reinterpret_cast<void *>(addresses[k]), static_cast<size_t>(lengths[k])});
      op.want += lengths[k];
    }
    ops.push_back(std::move(op));
  }
  static_cast<Ring *>(handle)->start(b, std::move(ops));
  return b;
}

// Start reading rows of one tensor straight into slots. Sorted rows at most max_gap apart (and max_rows long) share a
// read, the rows between go to `sink`. See plan.py, which is the reference. They join `batch`, or a new one for null.
void *hf_flash_ring_submit_rows(void *handle, void *batch, int fd, int64_t start, int64_t row_bytes, const int64_t *rows,
                                int64_t n, uint64_t base, const int64_t *slots, int64_t max_gap, int64_t max_rows,
                                uint64_t sink, int64_t *n_bytes, int64_t *n_reads) {
  Batch *b = batch ? static_cast<Batch *>(batch) : new Batch;
  std::vector<Op> ops;
  *n_bytes = 0;
  for (int64_t i = 0; i < n;) {
    Op op{b, fd, start + rows[i] * row_bytes, 0, 0};
    int64_t j = i;
    for (; j < n; j++) {
      const int64_t gap = j > i ? rows[j] - rows[j - 1] - 1 : 0;
      if (gap > max_gap || rows[j] - rows[i] >= max_rows) break;
      if (gap) op.iov.push_back(iovec{reinterpret_cast<void *>(sink), static_cast<size_t>(gap * row_bytes)});
      char *to = reinterpret_cast<char *>(base) + slots[j] * row_bytes;
      iovec *last = j > i && !gap ? &op.iov.back() : nullptr;
      if (last && static_cast<char *>(last->iov_base) + last->iov_len == to) last->iov_len += static_cast<size_t>(row_bytes);
      else op.iov.push_back(iovec{to, static_cast<size_t>(row_bytes)});
    }
    op.want = op.need = (rows[j - 1] - rows[i] + 1) * row_bytes;
    *n_bytes += op.want;
    ops.push_back(std::move(op));
    i = j;
  }
  *n_reads = static_cast<int64_t>(ops.size());
  static_cast<Ring *>(handle)->start(b, std::move(ops), true);
  return b;
}

// 0: all bytes are there; 1: a read failed; 2: a signal came, call again.
int hf_flash_batch_wait(void *handle, void *batch) {
  Ring *r = static_cast<Ring *>(handle);
  Batch *b = static_cast<Batch *>(batch);
  std::unique_lock<std::mutex> hold(r->mutex);
  while (b->left > 0) {
    if (r->leader) {
      r->reaped.wait(hold);
      continue;
    }
    r->reap();
    if (b->left <= 0) break;
    r->leader = true;
    const unsigned wait = r->patience(b);
    hold.unlock();
    const int result = r->sleep(wait);
    const int error = result < 0 ? errno : 0;
    hold.lock();
    r->leader = false;
    // A call that submitted something says so and not EINTR: nothing there to reap tells the signal.
    const bool signal = error == EINTR || (result >= 0 && !r->landed());
    r->reap();
    r->reaped.notify_all();
    if (signal && b->left > 0) return 2;
  }
  r->flush();  // other batches' reads moved up, and nobody else may come to submit them
  r->reaped.notify_all();
  return b->error ? 1 : 0;
}

int hf_flash_batch_ready(void *handle, void *batch) {
  Ring *r = static_cast<Ring *>(handle);
  std::lock_guard<std::mutex> hold(r->mutex);
  if (!r->leader) r->reap(), r->flush();
  return static_cast<Batch *>(batch)->left <= 0;
}

// Have `call(who)` called, by a thread of the ring, when reads have landed; until unwatched, or the ring is closed. Null
// where that cannot be had. Never to be called with what `call` waits for.
void *hf_flash_ring_watch(void *handle, void (*call)(void *), void *who) {
  std::shared_ptr<Watcher> watcher = static_cast<Ring *>(handle)->watched();
  if (!watcher) return nullptr;
  std::lock_guard<std::mutex> hold(watcher->mutex);
  watcher->watches.push_back({call, who});
  return new std::shared_ptr<Watcher>(watcher);
}

// Returns once nobody is being told; the ring may be closed by then.
void hf_flash_ring_unwatch(void *watch, void *who) {
  std::shared_ptr<Watcher> *watcher = static_cast<std::shared_ptr<Watcher> *>(watch);
  {
    std::lock_guard<std::mutex> hold((*watcher)->mutex);
    std::vector<Watcher::Watch> &all = (*watcher)->watches;
    all.erase(std::remove_if(all.begin(), all.end(), [who](const Watcher::Watch &w) { return w.who == who; }), all.end());
  }
  delete watcher;
}

void hf_flash_batch_error(void *batch, int64_t *out) {  // errno, fd, offset, got, want
  Batch *b = static_cast<Batch *>(batch);
  out[0] = b->error, out[1] = b->error_fd, out[2] = b->error_offset, out[3] = b->error_got, out[4] = b->error_want;
}

void hf_flash_batch_free(void *batch) { delete static_cast<Batch *>(batch); }  // only once wait returned 0 or 1

}  // extern "C"

#else
extern "C" void *hf_flash_ring_open(unsigned, int) {
  errno = ENOSYS;
  return nullptr;
}
#endif

// Fibers, their schedule, and what they wait for.
#include "emulator.h"

#include <stdlib.h>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>

#undef cluster_sync
#undef grid_sync
#undef grid_dependency_wait
#undef barrier_wait

namespace emulator {

using coordatt::cuda::Launch;

Where here;
Settings settings;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_bytes = 512 << 10;
#else
constexpr size_t stack_bytes = 64 << 10;
#endif

// Switching stacks.
#if defined(__x86_64__)
struct Context { void* stack = nullptr; };
extern "C" void coordatt_switch(void** from, void* to);
asm(R"(
.text
.globl coordatt_switch
.hidden coordatt_switch
coordatt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void start_context(Context& c, char* stack, void (*entry)()) {
  void** top = (void**)(((uintptr_t)stack + stack_bytes) & ~(uintptr_t)15);
  *--top = nullptr;
  *--top = (void*)entry;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack = top;
}
void switch_context(Context& from, Context& to) { coordatt_switch(&from.stack, to.stack); }
#else
struct Context { ucontext_t context; };
void start_context(Context& c, char* stack, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = stack_bytes;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct Block;
struct Fiber {
  Context context;
  Block* block;
  unsigned thread;
  char* stack;
  int site = -1;  // where it waits
  std::vector<std::pair<void*, const void*>> copies;  // not yet given to a barrier
};

// Fibers that wait for one another.
struct Meeting {
  int expected = 0;
  std::vector<Fiber*> waiting;
};

struct Warp : Meeting {
  int round = 0;
  char slot[2][32][8];
};

struct Grid;
struct Cluster : Meeting {
  std::vector<Block*> blocks;
};

struct Block {
  Grid* grid;
  Cluster* cluster;
  unsigned index;
  int live;
  char* shared;
  Meeting all;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::pair<uint64_t*, Fiber*>> at_barriers;
};

struct Grid {
  Launch launch;
  std::function<void()> kernel;
  std::vector<unsigned> order;  // of clusters still to start
  int resident = 0, unfinished = 0;
  Meeting all;
  std::vector<Fiber*> dependents;  // wait for the grid before
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Copy {
  std::vector<std::pair<void*, const void*>> parts;  // of 16 bytes
  uint64_t* barrier;
  Block* block;
  int bytes;  // counted by the barrier; 0: an arrival
};

struct Word {  // a barrier in shared memory
  uint16_t expected, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Word) == 8);

std::vector<std::string> site_names, launched;
std::vector<std::unique_ptr<Grid>> queue;
std::vector<Fiber*> ready;
std::vector<Copy> copies;
std::vector<char*> free_stacks;
std::mt19937_64 random_number;
enum { at_once, late, any_time } copying;
bool ahead;        // one block runs as far ahead of the others as it can
Block* favourite;
Fiber* self;
Grid* first;  // the grid that nothing is waited for
Context scheduler;
std::string error;

void fail(const std::string& text) {
  if (error.empty()) error = text;
  switch_context(self->context, scheduler);  // never comes back
}

void wait(int at) {
  self->site = at;
  Where mine = here;
  Fiber* me = self;
  switch_context(me->context, scheduler);
  self = me;
  here = mine;
  me->site = -1;
}

void wake(std::vector<Fiber*>& fibers) {
  ready.insert(ready.end(), fibers.begin(), fibers.end());
  fibers.clear();
}

void meet(Meeting& m, int at) {
  if ((int)m.waiting.size() + 1 == m.expected) {
    wake(m.waiting);
    ready.push_back(self);
  } else {
    m.waiting.push_back(self);
  }
  wait(at);
}

Word& word(uint64_t* b) { return *(Word*)b; }

void check_phase(uint64_t* b, Block* block) {
  Word& w = word(b);
  if (w.pending || w.bytes) return;
  w.phase ^= 1;
  w.pending = w.expected;
  auto& at = block->at_barriers;
  for (size_t i = 0; i < at.size();) {
    if (at[i].first != b) { ++i; continue; }
    ready.push_back(at[i].second);
    at[i] = at.back();
    at.pop_back();
  }
}

// The 16 bytes at either end of a window may reach beyond its tensor.
__attribute__((no_sanitize("address"))) void copy_part(void* to, const void* from) {
  struct Pair { uint64_t a, b; };
  *(volatile uint64_t*)to = *(const volatile uint64_t*)from;
  *((volatile uint64_t*)to + 1) = *((const volatile uint64_t*)from + 1);
}

void land(size_t i) {
  Copy c = std::move(copies[i]);
  copies[i] = std::move(copies.back());
  copies.pop_back();
  for (auto& part : c.parts) copy_part(part.first, part.second);
  Word& w = word(c.barrier);
  if (c.bytes) w.bytes -= c.bytes;
  else --w.pending;
  check_phase(c.barrier, c.block);
}

void add_copy(Copy c) {
  copies.push_back(std::move(c));
  if (copying == at_once) land(copies.size() - 1);
}

void fiber_entry() {
  Fiber* me = self;
  me->block->grid->kernel();
  self = me;
  Block* b = me->block;
  if (!b->all.waiting.empty()) error = "a thread has left while others wait at " + site_names[b->all.waiting[0]->site];
  if (!me->copies.empty()) error = "a thread has left with copies that no barrier counts";
  --b->live;
  switch_context(me->context, scheduler);
}

char* take_stack() {
  if (free_stacks.empty()) {
    char* p = (char*)mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
    return p;
  }
  char* p = free_stacks.back();
  free_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(p, stack_bytes);  // what the fiber before left its frames marked with
#endif
  return p;
}

void start_cluster(Grid& g) {
  unsigned index = g.order.back();
  g.order.pop_back();
  g.clusters.push_back(std::make_unique<Cluster>());
  Cluster& c = *g.clusters.back();
  c.expected = g.launch.cluster * g.launch.threads;
  ++g.resident;
  for (int i = 0; i < g.launch.cluster; ++i) {
    g.blocks.push_back(std::make_unique<Block>());
    Block& b = *g.blocks.back();
    c.blocks.push_back(&b);
    b.grid = &g;
    b.cluster = &c;
    b.index = index * g.launch.cluster + i;
    b.live = b.all.expected = g.launch.threads;
    b.shared = (char*)aligned_alloc(128, std::max(128, (g.launch.shared + 127) / 128 * 128));
    memset(b.shared, 0xff, g.launch.shared);
    b.warps.resize(g.launch.threads / 32);
    for (Warp& w : b.warps) w.expected = 32;
    for (int t = 0; t < g.launch.threads; ++t) {
      b.fibers.push_back(std::make_unique<Fiber>());
      Fiber& f = *b.fibers.back();
      f.block = &b;
      f.thread = t;
      f.stack = take_stack();
      start_context(f.context, f.stack, fiber_entry);
      ready.push_back(&f);
    }
  }
}

void end_cluster(Cluster& c) {
  for (Block* b : c.blocks) {
    for (auto& f : b->fibers) free_stacks.push_back(f->stack);
    b->fibers.clear();
    free(b->shared);
    b->shared = nullptr;
  }
  --c.blocks[0]->grid->resident;
  c.blocks[0]->grid->unfinished -= (int)c.blocks.size();
}

void run_fiber(Fiber* f) {
  Block& b = *f->block;
  const Launch& l = b.grid->launch;
  self = f;
  here = {{f->thread, 0, 0}, {b.index, 0, 0}, {(unsigned)l.threads, 1, 1}, {(unsigned)l.blocks, 1, 1}, b.shared};
  switch_context(scheduler, f->context);
  if (b.live) return;
  for (Block* other : b.cluster->blocks)
    if (other->live) return;
  end_cluster(*b.cluster);
}

std::string deadlock(const Grid& g) {
  for (auto& b : g.blocks)
    for (auto& f : b->fibers)
      if (f->site >= 0) return "deadlock: a thread waits for ever at " + site_names[f->site];
  return "deadlock";
}

void run_first(Grid* next) {
  Grid& g = *first;
  wake(g.dependents);
  int64_t steps = 0;
  while (g.unfinished && error.empty()) {
    // Blocks beside one another: all of a cooperative grid, else two clusters; of a dependent grid, the first early.
    while (!g.order.empty() && (g.launch.cooperative || g.resident < 2)) start_cluster(g);
    if (next && !next->order.empty() && next->resident < 1 && random_number() % 64 == 0) start_cluster(*next);
    if (!copies.empty() && (ready.empty() || (copying == any_time && random_number() % 16 == 0)))
      land(random_number() % copies.size());
    if (ready.empty()) {
      if (copies.empty() && g.unfinished) error = deadlock(g);
      continue;
    }
    if (++steps > 20000000) error = "no end in sight";
    size_t chosen = random_number() % ready.size();
    if (ahead) {
      for (size_t i = ready.size(); i-- > 0;)  // what was woken last stands last
        if (ready[i]->block == favourite) {
          chosen = i;
          break;
        }
      favourite = ready[chosen]->block;
    }
    std::swap(ready[chosen], ready.back());
    Fiber* f = ready.back();
    ready.pop_back();
    run_fiber(f);
  }
}

void abandon() {
  for (auto& g : queue)
    for (auto& b : g->blocks) {
      for (auto& f : b->fibers) free_stacks.push_back(f->stack);
      free(b->shared);
    }
  queue.clear();
  ready.clear();
  copies.clear();
}

}  // namespace

int site(const char* file, int line) {
  std::string name = std::string(file).substr(std::string(file).rfind('/') + 1) + ":" + std::to_string(line);
  auto found = std::find(site_names.begin(), site_names.end(), name);
  if (found == site_names.end()) found = site_names.insert(found, name);
  return (int)(found - site_names.begin());
}

const std::vector<std::string>& sites() { return site_names; }

void sync_threads(int at) {
  if (at != settings.skip) meet(self->block->all, at);
}

void cluster_sync(int at) {
  if (at != settings.skip) meet(*self->block->cluster, at);
}

void grid_sync(int at) {
  if (!self->block->grid->launch.cooperative) fail("grid_sync in a launch that is not cooperative");
  if (at != settings.skip) meet(self->block->grid->all, at);
}

void grid_dependency_wait(int at) {
  Grid* mine = self->block->grid;
  if (at == settings.skip || mine == first) return;
  mine->dependents.push_back(self);
  wait(at);
}

void shuffle_xor(void* value, int bytes, int mask) {
  static const int at = site("shuffle", 0);
  Warp& w = self->block->warps[self->thread / 32];
  int lane = self->thread % 32, round = w.round;
  memcpy(w.slot[round & 1][lane], value, bytes);
  if ((int)w.waiting.size() + 1 == w.expected) ++w.round;
  meet(w, at);
  memcpy(value, w.slot[round & 1][lane ^ mask], bytes);
}

void barrier_init(uint64_t* b, int arrivals) { word(b) = {(uint16_t)arrivals, (uint16_t)arrivals, 0, 0}; }

void barrier_arrive(uint64_t* b) {
  --word(b).pending;
  check_phase(b, self->block);
}

void barrier_expect(uint64_t* b, int bytes) {
  word(b).bytes += bytes;
  barrier_arrive(b);
}

void barrier_wait(int at, uint64_t* b, int parity) {
  if (at == settings.skip) return;
  while ((int)word(b).phase == parity) {
    self->block->at_barriers.push_back({b, self});
    wait(at);
  }
}

void bulk_copy(void* shared, const void* global, int bytes, uint64_t* b) {
  if (((uintptr_t)shared | (uintptr_t)global | (uintptr_t)bytes) & 15) fail("a bulk copy that is not aligned to 16 bytes");
  Copy c{{}, b, self->block, bytes};
  for (int i = 0; i < bytes; i += 16) c.parts.push_back({(char*)shared + i, (const char*)global + i});
  add_copy(std::move(c));
}

void copy16(void* shared, const void* global) {
  if (((uintptr_t)shared | (uintptr_t)global) & 15) fail("a copy that is not aligned to 16 bytes");
  self->copies.push_back({shared, global});
}

void copy_arrive(uint64_t* b) { add_copy({std::exchange(self->copies, {}), b, self->block, 0}); }

const void* cluster_address(const void* p, int rank) {
  Block* b = self->block->cluster->blocks[rank];
  if (!b->live) fail("a block has left the cluster while others read its shared memory");
  return b->shared + ((const char*)p - here.shared);
}


std::vector<std::string> launches() { return std::exchange(launched, {}); }

void enqueue(const Launch& l, const char* name, std::function<void()> kernel) {
  std::string text(name);
  text = text.substr(text.find("kernel = ") + 9);  // of "[with auto kernel = pool_kernel<float, true>; Args = ..."
  text = text.substr(0, text.find('<'));
  launched.push_back(text + " blocks " + std::to_string(l.blocks) + " cluster " + std::to_string(l.cluster) + " shared " +
                     std::to_string(l.shared));
  if (l.threads % 32 || l.blocks % l.cluster || l.blocks < 1 || l.shared > settings.device.shared_memory)
    throw std::runtime_error("a launch that CUDA would refuse");
  auto g = std::make_unique<Grid>();
  g->launch = l;
  g->kernel = std::move(kernel);
  g->unfinished = l.blocks;
  g->all.expected = l.blocks * l.threads;
  for (int i = 0; i < l.blocks / l.cluster; ++i) g->order.push_back(i);
  queue.push_back(std::move(g));
}

void finish() {
  random_number.seed(settings.seed);
  copying = settings.seed % 3 == 0 ? at_once : settings.seed % 3 == 1 ? late : any_time;
  ahead = settings.seed % 2;
  favourite = nullptr;
  error.clear();
  for (auto& g : queue) std::shuffle(g->order.begin(), g->order.end(), random_number);
  for (size_t i = 0; i < queue.size() && error.empty(); ++i) {
    first = queue[i].get();
    bool early = i + 1 < queue.size() && queue[i + 1]->launch.dependent;
    run_first(early ? queue[i + 1].get() : nullptr);
  }
  std::string what = error;
  abandon();
  if (!what.empty()) throw std::runtime_error("emulator: " + what);
}

}  // namespace emulator

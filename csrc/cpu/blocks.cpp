#include "blocks.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include <deque>
#include <mutex>
#include <unordered_map>

#include "environment.h"

namespace coordatt {
namespace {

constexpr int64_t huge_page = 2 << 20;
constexpr int64_t page = 4096;

struct Block {
  void* data;
  int64_t size;
};

struct Store {
  std::mutex mutex;
  std::unordered_map<void*, int64_t> sizes;  // of every block in use
  std::deque<Block> waiting;                 // oldest first
  int64_t kept = 0;
};

// Never destroyed: tensors may outlive static destructors. Made when the library is loaded, so that no fork meets its making.
Store& store = *new Store;

// A fork takes the mutex as it is: locked for ever, if another thread holds it.
[[maybe_unused]] const int fork_handled =
    pthread_atfork([] { store.mutex.lock(); }, [] { store.mutex.unlock(); }, [] { store.mutex.unlock(); });

void* map(int64_t size) {
  bool huge = size >= 2 * huge_page;
  int64_t extra = huge ? huge_page : 0;
  void* p = mmap(nullptr, (size_t)(size + extra), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  if (!huge) return p;
  char* begin = (char*)(((uintptr_t)p + huge_page - 1) / huge_page * huge_page);
  if (begin > (char*)p) munmap(p, (size_t)(begin - (char*)p));
  char* end = (char*)p + size + extra;
  if (end > begin + size) munmap(begin + size, (size_t)(end - begin - size));
#if defined(MADV_HUGEPAGE)
  madvise(begin, (size_t)size, MADV_HUGEPAGE);
#endif
  return begin;
}

}  // namespace

void* take_block(int64_t bytes) {
  Store& s = store;
  if (environment().keep_bytes == 0) return nullptr;
  int64_t unit = bytes >= 2 * huge_page ? huge_page : page;
  int64_t size = (bytes + unit - 1) / unit * unit;
  void* data = nullptr;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    auto best = s.waiting.end();
    for (auto i = s.waiting.begin(); i != s.waiting.end(); ++i)
      if (i->size >= size && i->size <= size + size / 4 && (best == s.waiting.end() || i->size <= best->size)) best = i;
    if (best != s.waiting.end()) {  // of equals the youngest: likeliest to be in cache
      data = best->data;
      size = best->size;
      s.kept -= size;
      s.waiting.erase(best);
      s.sizes[data] = size;
    }
  }
  if (!data) {
    data = map(size);
    if (!data) return nullptr;
    std::lock_guard<std::mutex> lock(s.mutex);
    s.sizes[data] = size;
  }
  if (environment().poison) memset(data, 0xff, (size_t)size);
  return data;
}

void give_block(void* data) {
  Store& s = store;
  std::deque<Block> dropped;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    auto found = s.sizes.find(data);
    int64_t size = found->second;
    s.sizes.erase(found);
    s.waiting.push_back({data, size});
    s.kept += size;
    while (s.kept > environment().keep_bytes && !s.waiting.empty()) {
      dropped.push_back(s.waiting.front());
      s.kept -= s.waiting.front().size;
      s.waiting.pop_front();
    }
  }
  for (const Block& b : dropped) munmap(b.data, (size_t)b.size);
}

}  // namespace coordatt

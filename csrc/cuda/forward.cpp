// Forward of a whole call: which kernels, in which cut, with which scratch memory.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "passes.h"
#include "verified.h"

namespace coordatt {
namespace cuda {
namespace {

// Values of forced, too: what set_forward asked for.
enum Way : int { automatic = -2, any = -1, chain = 0, resident = 64 };  // 1 to 16: clusters of so many blocks
std::atomic<int> forced{automatic};

struct Plan {
  Way way = chain;
  Cut cut;
  int clusters = 0;
  int held = 0;
};

// The clusters' size: rounds of images, each as long as a block's share takes plus what starts and ends it. The two
// constants are an estimate that no device has confirmed.
bool plan_one_pass(const ForwardArgs& f, const Device& device, const Run& run, Plan& plan) {
  if (f.nhwc || device.max_cluster == 0 || !f.shape.m) return false;
  constexpr double start = 3000, bytes_per_ns = 40;
  double best = 0;
  int wanted = forced.load();
  for (int blocks = 1; blocks <= device.max_cluster; blocks *= 2) {
    if (wanted >= 1 && wanted <= 16 && blocks != wanted) continue;
    Cut cut = resident_cut(f, aligned(f, f.x), device, blocks, 3);
    if (!cut.shared) continue;
    OnePass a{};
    (Call&)a = f;
    int held = clusters_held(a, blocks, cut.shared, run);
    if (!held) continue;
    double rounds = (double)((f.shape.n + held - 1) / held), share = (double)cut.room.ring;
    double crowd = (double)held * blocks / device.processors;
    double time = rounds * (start + share * (crowd > 1 ? crowd : 1) / bytes_per_ns);
    if (plan.way == chain || time < best) {
      best = time;
      plan.way = (Way)blocks;
      plan.cut = cut;
      plan.held = held;
      plan.clusters = (int)(f.shape.n < held ? f.shape.n : held);
    }
  }
  return plan.way != chain;
}

// Training in one launch: as few blocks to an image as hold it, if all of them run at a time.
bool plan_resident(const ForwardArgs& f, const Device& device, const Run& run, Plan& plan) {
  const Shape& s = f.shape;
  for (int64_t blocks = 1; blocks <= s.c; blocks *= 2) {
    if (s.n * blocks > 64 * (int64_t)device.processors) return false;
    Cut cut = resident_cut(f, aligned(f, f.x), device, (int)blocks, 0);
    if (!cut.shared) continue;
    // Fewer blocks than SMs would leave some idle while there are channels to give them.
    if (s.n * blocks * 2 <= device.processors && blocks * 2 <= s.c) continue;
    OnePass a{};
    (Call&)a = f;
    a.geometry = cut.geometry;
    int held = training_blocks_held(a, cut.shared, run);
    if (held < s.n * cut.geometry.groups) return false;
    plan.held = held;
    plan.way = resident;
    plan.cut = cut;
    return true;
  }
  return false;
}

const char* make_plan(const ForwardArgs& f, const Run& run, Plan& plan) {
  const Device* device;
  if (const char* why = device_of(run, device)) return why;
  int wanted = forced.load();
  bool training = f.saved.gates != nullptr;
  const char* one_launch = training ? "resident" : "cluster";
  bool allowed = wanted == any || (wanted == automatic && is_verified(one_launch, device->arch));
  if (training && (allowed || wanted == resident) && plan_resident(f, *device, run, plan)) return nullptr;
  bool forced_cluster = wanted >= 1 && wanted <= 16;
  if (!training && (allowed || forced_cluster) && plan_one_pass(f, *device, run, plan)) return nullptr;
  plan.cut = stream_cut(f, aligned(f, f.x), *device, 1, 1, !training);
  return plan.cut.shared ? nullptr : too_long;
}

// What a plan depends on.
struct Key {
  int64_t n, c, h, w, m;
  int device, wanted, dtype, flags;
  bool operator==(const Key& k) const {
    return n == k.n && c == k.c && h == k.h && w == k.w && m == k.m && device == k.device && wanted == k.wanted &&
           dtype == k.dtype && flags == k.flags;
  }
};

// Kept for the shapes of late: a call asks twice, and CUDA's answers on what the device holds take microseconds.
const char* plan_of(const ForwardArgs& f, const Run& run, Plan& plan) {
  constexpr int kept = 64;
  static thread_local struct { Key key; Plan plan; } plans[kept];
  static thread_local int used = 0, next = 0;
  const Shape& s = f.shape;
  int flags = f.nhwc | aligned(f, f.x) << 1 | (f.saved.gates != nullptr) << 2;
  Key key{s.n, s.c, s.h, s.w, s.m, run.device, forced.load(), (int)f.dtype, flags};
  for (int i = 0; i < used; ++i)
    if (plans[i].key == key) {
      plan = plans[i].plan;
      return nullptr;
    }
  if (const char* why = make_plan(f, run, plan)) return why;
  plans[next] = {key, plan};
  next = (next + 1) % kept;
  if (used < kept) ++used;
  return nullptr;
}

// Scratch: the groups' parts of the squeezed middle, [N, groups, M, L].
size_t needs(const Call& call, const Plan& plan) {
  if (plan.way != chain && plan.way != resident) return 0;
  const Shape& s = call.shape;
  return (size_t)round_up(s.n * plan.cut.geometry.groups * s.m * s.length() * acc_bytes_of(call.dtype), 256);
}

}  // namespace

bool set_forward(const char* way) {
  if (!*way) forced = automatic;
  else if (!strcmp(way, "any")) forced = any;
  else if (!strcmp(way, "chain")) forced = chain;
  else if (!strcmp(way, "resident")) forced = resident;
  else if (!strcmp(way, "cluster:1")) forced = 1;
  else if (!strcmp(way, "cluster:2")) forced = 2;
  else if (!strcmp(way, "cluster:4")) forced = 4;
  else if (!strcmp(way, "cluster:8")) forced = 8;
  else if (!strcmp(way, "cluster:16")) forced = 16;
  else return false;
  return true;
}

const char* obstacle(const Call& call) {
  if (call.shape.length() > max_length(call.dtype))
    return call.dtype == DType::f64 ? "H + W is above 2048 (float64)" : "H + W is above 4096";
  if (call.shape.rows() >> 30 || (call.shape.n * call.shape.c) >> 30) return "N * (H + W) or N * C is above 2 ** 30";
  return nullptr;
}

const char* way_of(const ForwardArgs& f, const Run& run) {
  Plan plan;
  if (const char* why = plan_of(f, run, plan)) return why;
  switch ((int)plan.way) {
    case chain: return "chain";
    case resident: return "resident";
    case 1: return "cluster:1";
    case 2: return "cluster:2";
    case 4: return "cluster:4";
    case 8: return "cluster:8";
    default: return "cluster:16";
  }
}

const char* outline_of(const ForwardArgs& f, const Run& run, Outline& o) {
  Plan plan;
  const Device* device;
  if (const char* why = plan_of(f, run, plan)) return why;
  if (const char* why = device_of(run, device)) return why;
  const Geometry& g = plan.cut.geometry;
  bool cluster = plan.way != chain && plan.way != resident;
  int blocks = (int)(cluster ? plan.clusters * (int64_t)plan.way : f.shape.n * g.groups);
  o = {blocks, cluster ? (int)plan.way : 1, plan.cut.shared, g.group, g.groups, g.stages, plan.held,
       device->processors, device->shared_per_processor};
  return nullptr;
}

size_t workspace_bytes(const ForwardArgs& f, const Run& run) {
  Plan plan;
  return plan_of(f, run, plan) ? 0 : needs(f, plan);
}

const char* forward(const ForwardArgs& f, const RunningStatistics& running, const Run& run) {
  Plan plan;
  if (const char* why = plan_of(f, run, plan)) return why;
  if (needs(f, plan) > run.workspace_bytes) return "set_forward was called during this call";
  if (plan.way != chain) {
    OnePass a = pass_of<OnePass>(f, plan.cut);
    a.x = f.x;
    a.out = f.out;
    a.partial = run.workspace;
    a.saved = f.saved;
    a.running = running;
    if (plan.way == resident) return launch_resident_training(a, plan.cut.shared, run);
    return launch_one_pass(a, plan.way, plan.clusters, plan.cut.shared, run);
  }
  PoolPass pool = pass_of<PoolPass>(f, plan.cut);
  pool.x = f.x;
  pool.means = f.saved.pooled;
  pool.partial = run.workspace;
  if (const char* why = launch(pool, run)) return why;

  GatePass gate = pass_of<GatePass>(f, plan.cut);
  gate.x = f.x;
  gate.out = f.out;
  if (f.saved.gates) {
    StatisticsPass statistics{};
    (Call&)statistics = f;
    statistics.geometry = plan.cut.geometry;
    statistics.partial = run.workspace;
    statistics.saved = f.saved;
    statistics.running = running;
    if (const char* why = launch(statistics, run)) return why;
    gate.saved = f.saved;
    gate.tracked = running.tracked;
  } else {
    gate.partial = run.workspace;
  }
  return launch(gate, run);
}

const char* update_running_stats(const RunningStatistics& running, const Call& call, const void* mean, const void* var,
                                 int64_t rows, const Run& run) {
  return launch(UpdatePass{call.dtype, (int)call.shape.m, rows, running, mean, var}, run);
}

}  // namespace cuda
}  // namespace coordatt

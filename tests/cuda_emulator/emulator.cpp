// The machine behind emulated_device.h: fibers, their barriers, shared memory and bulk copies.
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulated_device.h"
#include "../../csrc/cuda/sizes.h"

namespace em_kernels::cuda {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int thread, rank;
  uint64_t cluster_phase;  // barriers of the cluster this thread has arrived at
  bool done;
};

// Releases those who wait when `expected` have come.
struct Meeting {
  int expected = 0, come = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Meeting meeting;
  Slots slots[2];  // by turns, so that the next exchange overwrites nothing
  int turn[kWarp];
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
};

struct Block {
  std::vector<unsigned char> storage;
  unsigned char* shared;
  Meeting meeting;
  std::vector<Warp> warps;
  std::unordered_map<const Arrival*, std::vector<Copy>> copies;  // of arrivals that are initialised
  int running;
};

struct Machine {
  std::mt19937 random{0};
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  std::vector<Block> blocks;
  Meeting cluster;
  const Plan* plan = nullptr;
  const std::function<void()>* thread = nullptr;
  Fiber* running = nullptr;
  int64_t first_block = 0;
  ucontext_t scheduler;
  std::string error;
};

std::mutex one_at_a_time;
Machine machine;

Block& block() { return machine.blocks[machine.running->rank]; }

void give_way() { swapcontext(&machine.running->context, &machine.scheduler); }

void arrive(Meeting& meeting) {
  if (++meeting.come < meeting.expected) return;
  meeting.come = 0;
  ++meeting.phase;
  machine.ready.insert(machine.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
}

// The last to come goes on in its turn, not first.
void wait_past(Meeting& meeting, uint64_t phase) {
  (meeting.phase > phase ? machine.ready : meeting.waiting).push_back(machine.running);
  give_way();
}

void meet(Meeting& meeting) {
  const uint64_t phase = meeting.phase;
  arrive(meeting);
  wait_past(meeting, phase);
}

// The shared memory of a block that has ended is another's.
void fiber_main() {
  (*machine.thread)();
  machine.running->done = true;
  if (--block().running == 0) std::memset(block().shared, 0xff, machine.plan->shared_bytes);
  give_way();
}

void prepare_block(Block& b) {
  const Plan& plan = *machine.plan;
  // Canaries behind the shared memory that was asked for.
  b.storage.assign(plan.shared_bytes + 256, 0xff);
  b.shared = b.storage.data() + (128 - reinterpret_cast<uintptr_t>(b.storage.data()) % 128) % 128;
  b.meeting = Meeting();
  b.meeting.expected = plan.threads;
  b.warps.assign(plan.threads / kWarp, Warp());
  for (Warp& warp : b.warps) warp.meeting.expected = kWarp;
  b.copies.clear();
  b.running = plan.threads;
}

void prepare_fiber(Fiber& fiber, int rank, int thread) {
  fiber.rank = rank;
  fiber.thread = thread;
  fiber.cluster_phase = 0;
  fiber.done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  machine.ready.push_back(&fiber);
}

void check_block(const Block& b) {
  const auto* end = b.shared + machine.plan->shared_bytes;
  for (auto* p = end; p < b.storage.data() + b.storage.size(); ++p)
    if (*p != 0xff) throw std::runtime_error("a thread wrote behind its block's shared memory");
  for (const auto& [arrival, copies] : b.copies)
    if (!copies.empty()) throw std::runtime_error("a block ended before its copy was waited for");
}

void run_cluster() {
  const Plan& plan = *machine.plan;
  const int count = plan.cluster * plan.threads;
  while (int(machine.fibers.size()) < count) machine.fibers.push_back(std::make_unique<Fiber>());
  machine.blocks.resize(plan.cluster);
  for (Block& b : machine.blocks) prepare_block(b);
  machine.cluster = Meeting();
  machine.cluster.expected = count;
  machine.ready.clear();
  for (int i = 0; i < count; ++i)
    prepare_fiber(*machine.fibers[i], i / plan.threads, i % plan.threads);
  // One thread, often the first of its block, is last whenever there is another to run.
  const int first = machine.random() % plan.cluster * plan.threads;
  const Fiber* last =
      machine.fibers[first + (machine.random() % 2 ? machine.random() % plan.threads : 0)].get();
  int done = 0;
  while (!machine.ready.empty()) {
    const size_t count_ready = machine.ready.size();
    size_t pick = machine.random() % count_ready;
    if (machine.ready[pick] == last) pick = (pick + 1) % count_ready;
    std::swap(machine.ready[pick], machine.ready.back());
    machine.running = machine.ready.back();
    machine.ready.pop_back();
    swapcontext(&machine.scheduler, &machine.running->context);
    done += machine.running->done;
  }
  if (!machine.error.empty()) throw std::runtime_error(std::exchange(machine.error, {}));
  if (done < count)
    throw std::runtime_error(
        std::to_string(count - done) + " of " + std::to_string(count) + " threads wait for ever");
  for (const Block& b : machine.blocks) check_block(b);
}

}  // namespace

void run_grid(const Plan& plan, uintptr_t seed, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  machine.plan = &plan;
  machine.thread = &thread;
  machine.random.seed(static_cast<unsigned>(seed));
  std::vector<int64_t> clusters(plan.blocks / plan.cluster);
  std::iota(clusters.begin(), clusters.end(), 0);
  std::shuffle(clusters.begin(), clusters.end(), machine.random);
  for (const int64_t cluster : clusters) {
    machine.first_block = cluster * plan.cluster;
    run_cluster();
  }
}

int thread_index() { return machine.running->thread; }
int block_threads() { return machine.plan->threads; }
int64_t block_index() { return machine.first_block + machine.running->rank; }
unsigned char* shared_memory() { return block().shared; }
int cluster_rank() { return machine.running->rank; }
int cluster_blocks() { return machine.plan->cluster; }
int64_t cluster_index() { return machine.first_block / machine.plan->cluster; }

Device device(int) { return {90, 232448, 233472, kMaxCluster, 132}; }
std::string why_no_driver() { return ""; }
int runtime_version() { return 0; }

void read_global(const void* from, uint32_t (&to)[4]) {
  const auto* byte = static_cast<const unsigned char*>(from);
  const Block& b = block();
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) machine.error = "16 bytes are not aligned";
  if (b.storage.data() <= byte && byte < b.storage.data() + b.storage.size())
    machine.error = "shared memory is read as global memory";
  std::memcpy(to, from, sizeof(to));
}

void sync_block() { meet(block().meeting); }

void cluster_arrive() {
  machine.running->cluster_phase = machine.cluster.phase;
  arrive(machine.cluster);
}
void cluster_wait() { wait_past(machine.cluster, machine.running->cluster_phase); }

const Slots& exchange(const void* value, size_t bytes) {
  const int thread = thread_index(), lane = thread % kWarp;
  Warp& warp = block().warps[thread / kWarp];
  Slots& slots = warp.slots[warp.turn[lane]++ % 2];
  std::memcpy(slots[lane], value, bytes);
  meet(warp.meeting);
  return slots;
}

const void* peer_address(const void* own, int rank) {
  const auto offset = static_cast<const unsigned char*>(own) - block().shared;
  return machine.blocks[rank].shared + offset;
}

void init_arrivals(Arrival* arrivals, int count) {
  for (int i = 0; i < count; ++i) block().copies[arrivals + i];
}

std::vector<Copy>& copies_on(Arrival* arrival) {
  if (!block().copies.count(arrival)) machine.error = "an arrival is not initialised";
  return block().copies[arrival];
}

void start_copy(void* to, const void* from, uint32_t bytes, Arrival* arrival) {
  const bool fits = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(from) % 16 == 0;
  if (bytes == 0) return;
  if (!fits) machine.error = "a bulk copy is not of whole aligned 16 bytes";
  copies_on(arrival).push_back({to, from, bytes});
}

void wait_copy(Arrival* arrival) {
  for (const Copy& copy : copies_on(arrival)) std::memcpy(copy.to, copy.from, copy.bytes);
  copies_on(arrival).clear();
}

float to_float(uint16_t bits, bf16) {
  const uint32_t wide = uint32_t(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

uint16_t to_bits(float x, bf16) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float to_float(uint16_t bits, f16) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size;
  if (exponent == 31) {
    size = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    size = std::ldexp(float(fraction), -24);
  } else {
    size = std::ldexp(float(fraction + 1024), exponent - 25);
  }
  return bits & 0x8000 ? -size : size;
}

uint16_t to_bits(float x, f16) {
  if (x != x) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // in [1/2, 1)
  // A fraction that rounds up to 2048 carries into the exponent, as it should.
  const int rounded = int(std::nearbyint(std::ldexp(fraction, 11)));
  return sign | uint16_t(((exponent + 14) << 10) + (rounded - 1024));
}

}  // namespace em_kernels::cuda

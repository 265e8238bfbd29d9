// Every CUDA kernel on a few small rows, against a plain double-precision loop: no Python, no torch.
//
//     python cuda_build.py cases && build/cuda/cases [--from N]     exits with 1 if a case fails
//
// A refused launch fails its case alone. After one that costs the device nothing more can run in the
// process: it ends, and says from where another goes on.
//
// Small, so that it also runs under compute-sanitizer. The paths of `loss` (two passes; a cluster
// of 1, 2, 4 or 8 blocks) are chosen by understating what the device has. The tests run it on the
// emulated kernels, with EM_EMULATED defined; then the device's memory is the host's.
#if !defined(EM_EMULATED)
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/cuda/kernels.h"

namespace {

using namespace em_kernels;
using namespace em_kernels::cuda;

// Random, with -inf, masked, nearly certain, with a NaN, target excluded, so large that z is beyond
// the dtype, denormal.
constexpr int kRows = 8;
constexpr int kMasked = 2, kNaN = 4;
constexpr int64_t kGuard = 8;  // entries between rows, and after the last, that nothing may touch
constexpr double kInf = std::numeric_limits<double>::infinity();
const char* const kDTypes[] = {"float32", "bfloat16", "float16", "float64"};
const char* const kOperations[] = {"stats", "grad", "loss"};

#if defined(EM_EMULATED)
void* allocate(size_t bytes) { return std::malloc(bytes); }
void release(void* memory) { std::free(memory); }
void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

// What a launch of case EM_REFUSED, and any call after it in case EM_LOST, does on a GPU.
int64_t running = 0;
int64_t setting(const char* name) { return std::getenv(name) ? std::atoll(std::getenv(name)) : -1; }
bool lost() { return setting("EM_LOST") >= 0 && running >= setting("EM_LOST"); }
void wait() {
  if (running == setting("EM_REFUSED")) throw std::runtime_error("the launch was refused");
  if (lost()) throw std::runtime_error("an illegal memory access was encountered");
}
#else
void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  return memory;
}
void release(void* memory) { cudaFree(memory); }
void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
void wait() {
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
}
// A refused launch leaves an error that is told once; one that is told again is there to stay.
bool lost() {
  cudaGetLastError();
  return cudaDeviceSynchronize() != cudaSuccess;
}
#endif

// The nearest bfloat16 and back, by its bits.
uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// An entry of a tensor of `dtype`, on the host.
double load(const std::vector<char>& bytes, DType dtype, int64_t index) {
  const char* at = bytes.data() + index * size_of(dtype);
  const auto as = [&](auto value) {
    std::memcpy(&value, at, sizeof value);
    return value;
  };
  switch (dtype) {
    case DType::f32: return as(float());
    case DType::bf16: return from_bf16(as(uint16_t()));
    case DType::f16: return as(_Float16());
    default: return as(double());
  }
}

void store(std::vector<char>& bytes, DType dtype, int64_t index, double value) {
  char* at = bytes.data() + index * size_of(dtype);
  const auto put = [&](auto x) { std::memcpy(at, &x, sizeof x); };
  switch (dtype) {
    case DType::f32: return put(float(value));
    case DType::bf16: return put(to_bf16(float(value)));
    case DType::f16: return put(_Float16(value));
    default: return put(value);
  }
}

// The spacing of numbers of `dtype` near 1.
double epsilon(DType dtype) {
  switch (dtype) {
    case DType::f32: return std::ldexp(1, -23);
    case DType::bf16: return std::ldexp(1, -7);
    case DType::f16: return std::ldexp(1, -10);
    default: return std::ldexp(1, -52);
  }
}

// Memory on the device that holds a copy of a host vector.
class Memory {
 public:
  explicit Memory(std::vector<char> bytes) : host(std::move(bytes)) {
    device_ = allocate(std::max<size_t>(host.size(), 1));
    copy(device_, host.data(), host.size());
  }
  Memory(const Memory&) = delete;
  ~Memory() { release(device_); }
  void* get() const { return device_; }
  void fetch() { copy(host.data(), device_, host.size()); }

  std::vector<char> host;

 private:
  void* device_ = nullptr;
};

struct Case {
  Operation operation;
  DType dtype;
  DType out_dtype;
  bool full;      // bias, softcap, scale, temperature per row, all outputs
  bool in_place;  // `out` begins where the logits do
  int64_t apart;  // entries that rows of `out` begin further on than those of the logits
  int64_t vocab, valid;
  Device device;
  std::string path;

  std::string name() const {
    std::string text = std::string(kOperations[int(operation)]) + "-" + kDTypes[int(dtype)];
    if (out_dtype != dtype) text += std::string("-to-") + kDTypes[int(out_dtype)];
    text += full ? "-full" : "-plain";
    if (in_place) text += "-inplace";
    if (apart) text += "-apart";
    return text + (path.empty() ? "" : "-" + path) + "-V" + std::to_string(vocab);
  }
};

// What the call is given, in double precision as the device sees it.
struct Inputs {
  std::vector<std::vector<double>> x;  // kRows rows of vocab
  std::vector<double> bias, temperature, upstream[3];
  std::vector<int64_t> target;
  double scale = 1, softcap = 0, one_temperature = 1;
};

Inputs make_inputs(const Case& c) {
  std::mt19937 generator(17);
  std::normal_distribution<float> normal(0, 3);
  Inputs in;
  std::vector<char> rounded(8);
  for (int row = 0; row < kRows; ++row) {
    std::vector<double> x(c.vocab);
    for (double& value : x) {
      store(rounded, c.dtype, 0, normal(generator));
      value = load(rounded, c.dtype, 0);
    }
    in.target.push_back(generator() % c.valid);
    in.temperature.push_back(float(0.5 + 0.25 * row));
    for (auto& g : in.upstream) g.push_back(normal(generator));
    in.x.push_back(std::move(x));
  }
  for (int64_t v = 1; v < c.valid; v += 3) in.x[1][v] = -kInf;
  in.target[kMasked] = c.vocab + 5;
  in.x[3][c.valid / 2] = 40;
  in.x[kNaN][c.valid - 1] = std::nan("");
  if (c.valid > 2) in.x[5][in.target[5]] = -kInf;
  const double largest = c.dtype == DType::f64 ? 1.5e308 : c.dtype == DType::f16 ? 6e4 : 3e38;
  for (int64_t v = 0; v < c.vocab; ++v) {
    store(rounded, c.dtype, 0, largest);
    if (v % 3 == 0) in.x[6][v] = load(rounded, c.dtype, 0);
    store(rounded, c.dtype, 0, in.x[7][v] * (c.dtype == DType::f64 ? 1e-309 : 1e-39));
    in.x[7][v] = load(rounded, c.dtype, 0);
  }
  if (c.full) {
    for (int64_t v = 0; v < c.valid; ++v) in.bias.push_back(normal(generator));
    in.scale = 0.75;
    in.softcap = 20;
  } else {
    in.one_temperature = 0.7;
  }
  return in;
}

// One row by its formulas, in double precision.
struct Truth {
  double out[kOutputs];
  std::vector<double> grad;
};

Truth truth(const Case& c, const Inputs& in, int row) {
  const double T = c.full ? in.temperature[row] : in.one_temperature, factor = 1 / T;
  std::vector<double> u, slope;
  for (int64_t v = 0; v < c.valid; ++v) {
    const double whole = in.scale * in.x[row][v] + (c.full ? in.bias[v] : 0);
    const double tanh = in.softcap > 0 ? std::tanh(whole / in.softcap) : 0;
    u.push_back(in.softcap > 0 && whole != -kInf ? in.softcap * tanh : whole);
    slope.push_back(in.scale / T * (in.softcap > 0 ? 1 - tanh * tanh : 1));
  }
  Truth t;
  t.grad.assign(c.vocab, 0);
  if (row == kMasked || row == kNaN) {
    const double value = row == kNaN ? std::nan("") : 0;
    std::fill(t.out, t.out + kOutputs, value);
    std::fill(t.grad.begin(), t.grad.begin() + c.valid, value);
    return t;
  }
  const int64_t argmax = std::max_element(u.begin(), u.end()) - u.begin();
  const auto away = [&](int64_t v) { return factor * (u[v] - u[argmax]); };
  double r = 0, q = 0, collision = 0, count = 0, sum = 0;
  for (int64_t v = 0; v < c.valid; ++v) {
    const double d = away(v);
    if (u[v] == -kInf) continue;
    count += 1;
    sum += factor * u[v];
    if (d == -kInf) continue;
    if (v == argmax) continue;
    r += std::exp(d);
    q += std::exp(d) * d;
  }
  const double log_mass = std::log1p(r), mean_d = q / (1 + r), entropy = log_mass - mean_d;
  const double mean = sum / count;
  double varentropy = 0, square_log = 0, m2 = 0, m3 = 0;
  for (int64_t v = 0; v < c.valid; ++v) {
    if (u[v] == -kInf) continue;
    const double z = factor * u[v], d = away(v), p = std::exp(d - log_mass);
    varentropy += p * (d - mean_d) * (d - mean_d);
    collision += p * p;
    square_log += p * p * (d - mean_d);
    m2 += (z - mean) * (z - mean);
    m3 += (z - mean) * (z - mean) * (z - mean);
  }
  const int64_t y = in.target[row];
  const double logprob = away(y) - log_mass, p_y = std::exp(logprob);
  const double var = m2 / count;
  t.out[kMax] = u[argmax];
  t.out[kLog1pR] = log_mass;
  t.out[kMeanD] = mean_d;
  t.out[kLogprob] = logprob;
  t.out[kEntropy] = entropy;
  t.out[kLse] = factor * u[argmax] + log_mass;
  t.out[kVarentropy] = varentropy;
  t.out[kCollision] = collision;
  t.out[kMaxProb] = 1 / (1 + r);
  t.out[kIsTop1] = y == argmax;
  t.out[kSelfCertainty] = t.out[kLse] - mean - std::log(count);
  t.out[kLogitMean] = mean;
  t.out[kLogitVar] = var;
  t.out[kLogitSkew] = var > 0 ? m3 / count / std::pow(var, 1.5) : 0;
  t.out[kEntropySlope] = square_log - (p_y > 0 ? p_y * (logprob + entropy) : 0);
  for (int64_t v = 0; v < c.valid; ++v) {
    const double d = away(v);
    if (d == -kInf && v != y) continue;
    const double p = std::exp(d - log_mass);
    const double own = v == y ? -std::expm1(logprob) : -p;
    double g = in.upstream[0][row] * own + in.upstream[2][row] * p;
    if (p > 0) g += in.upstream[1][row] * p * (mean_d - d);
    t.grad[v] = g * slope[v];
  }
  return t;
}

// The largest error in units of what is allowed; NaN must meet NaN.
class Worst {
 public:
  void add(double got, double want, double allowed) {
    if (std::isnan(want) || std::isinf(want)) {
      const bool same = std::isnan(want) ? std::isnan(got) : got == want;
      value = std::max(value, same ? 0 : kInf);
    } else {
      const double error = std::abs(got - want) / allowed;
      value = std::max(value, std::isnan(error) ? kInf : error);
    }
  }
  double value = 0;
};

DType real(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

template <class Values>
std::vector<char> bytes_of(DType dtype, const Values& values) {
  std::vector<char> bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) store(bytes, dtype, i, values[i]);
  return bytes;
}

// Row i of a tensor begins here; a vocabulary that is not a multiple of 8 gives unaligned rows.
int64_t row_start(const Case& c, int row) { return kGuard + row * (c.vocab + kGuard); }

// A number as a tensor of `dtype` holds it.
double rounded_to(DType dtype, double value) {
  std::vector<char> bytes(8);
  store(bytes, dtype, 0, value);
  return load(bytes, dtype, 0);
}

// Logits with a guard of 1 around every row.
std::vector<char> with_guards(const Case& c, const Inputs& in) {
  std::vector<double> all(row_start(c, kRows), 1);
  for (int row = 0; row < kRows; ++row)
    std::copy(in.x[row].begin(), in.x[row].end(), all.begin() + row_start(c, row));
  return bytes_of(c.dtype, all);
}

bool wants(const Case& c, int output) {
  if (c.operation == Operation::gradient) return false;
  return c.full || output <= kLse;
}

struct Call {
  Problem problem;
  Results results;
  Gradient gradient;
};

// Runs one case and returns its worst error in units of what is allowed.
double run_case(const Case& c) {
  const Inputs in = make_inputs(c);
  const DType wide = real(c.dtype);
  std::vector<Truth> expected;
  for (int row = 0; row < kRows; ++row) expected.push_back(truth(c, in, row));

  Memory logits(with_guards(c, in)), bias(bytes_of(wide, in.bias));
  Memory temperature(bytes_of(wide, in.temperature));
  Memory out(std::vector<char>((row_start(c, kRows) + c.apart) * size_of(c.out_dtype), char(0x7b)));
  std::vector<char> targets(kRows * sizeof(int64_t)), masks(kRows, 1);
  std::memcpy(targets.data(), in.target.data(), targets.size());
  masks[kMasked] = 0;
  Memory target(targets), mask(masks);
  std::vector<double> saved[3];
  for (int k = 0; k < 3; ++k)
    for (const Truth& t : expected) saved[k].push_back(t.out[k]);
  Memory max(bytes_of(wide, saved[0])), log1p_r(bytes_of(wide, saved[1]));
  Memory mean_d(bytes_of(wide, saved[2]));
  Memory g0(bytes_of(wide, in.upstream[0])), g1(bytes_of(wide, in.upstream[1]));
  Memory g2(bytes_of(wide, in.upstream[2]));
  Memory columns(std::vector<char>(kOutputs * kRows * size_of(wide), char(0x7b)));

  const int64_t stride = c.vocab + kGuard;
  Call call;
  call.problem.dtype = c.dtype;
  call.problem.logits = static_cast<char*>(logits.get()) + row_start(c, 0) * size_of(c.dtype);
  call.problem.rows = kRows;
  call.problem.inner = 2;
  call.problem.outer_stride = 2 * stride;
  call.problem.inner_stride = stride;
  call.problem.vocab = c.vocab;
  call.problem.valid_vocab = c.valid;
  call.problem.bias = c.full ? bias.get() : nullptr;
  call.problem.target = static_cast<int64_t*>(target.get());
  call.problem.mask = static_cast<bool*>(mask.get());
  call.problem.temperature_rows = c.full ? temperature.get() : nullptr;
  call.problem.temperature = in.one_temperature;
  call.problem.softcap = in.softcap;
  call.problem.logit_scale = in.scale;
  for (int k = 0; k < kOutputs; ++k)
    if (wants(c, k))
      call.results.column[k] = static_cast<char*>(columns.get()) + k * kRows * size_of(wide);
  const int64_t narrow = size_of(c.dtype) / size_of(c.out_dtype);
  const int64_t out_stride = c.in_place ? stride * narrow : stride;
  Memory& written = c.in_place ? logits : out;
  if (c.operation != Operation::statistics) {
    call.gradient = {max.get(), log1p_r.get(), mean_d.get(), g0.get(), g1.get(), g2.get()};
    call.gradient.out = static_cast<char*>(written.get()) +
                        (row_start(c, 0) + c.apart) * size_of(c.in_place ? c.dtype : c.out_dtype);
    call.gradient.outer_stride = 2 * out_stride;
    call.gradient.inner_stride = out_stride;
    call.gradient.out_dtype = c.out_dtype;
  }
  const std::vector<char> before = written.host;
  run(c.operation, call.problem, call.results, call.gradient, c.device, nullptr);
  wait();

  Worst worst;
  columns.fetch();
  written.fetch();
  const double small = wide == DType::f64 ? 1e-11 : 2e-6;
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kOutputs; ++k) {
      if (!wants(c, k)) continue;
      const double want = rounded_to(wide, expected[row].out[k]);
      const double loose = k == kLogitSkew || k == kEntropySlope ? 20 : 5;
      // In a nearly certain row what is left of the entropy must be right, not only small.
      const bool relative = row == 3 && (k == kEntropy || k == kLog1pR);
      const double size = relative ? 10 * std::abs(want) + 1e-30 : std::max(1.0, std::abs(want));
      worst.add(load(columns.host, wide, k * kRows + row), want, loose * small * size);
    }
    if (c.operation == Operation::statistics) continue;
    double largest = 1e-30;
    for (double g : expected[row].grad) largest = std::max(largest, std::abs(g));
    const int64_t start = c.in_place ? row_start(c, row) * narrow : row_start(c, row) + c.apart;
    for (int64_t v = 0; v < c.vocab; ++v) {
      const double want = expected[row].grad[v];
      const double allowed = 10 * small * largest + epsilon(c.out_dtype) * std::abs(want) + 1e-7;
      worst.add(load(written.host, c.out_dtype, start + v), want, allowed);
    }
  }
  // Nothing between the rows was touched, and nothing at all by statistics.
  const int64_t entry = size_of(c.in_place ? c.dtype : c.out_dtype);
  for (int row = 0; row <= kRows; ++row) {
    const int64_t end = (row_start(c, row) + c.apart) * entry;
    const int64_t begin = end - kGuard * entry;
    if (std::memcmp(&before[begin], &written.host[begin], kGuard * entry)) worst.value = kInf;
  }
  if (c.operation == Operation::statistics && before != written.host) worst.value = kInf;
  return worst.value;
}

struct Path {
  std::string name;
  Device device;
};

// Every way there is to launch `c`: a device is described as having less and less.
std::vector<Path> paths(const Case& c, const Device& real_device) {
  if (c.operation != Operation::loss || c.full) return {{"", real_device}};
  Device old = real_device;
  old.compute_capability = 80;
  std::vector<Path> found{{"two-pass", old}};
  Problem problem;
  problem.dtype = c.dtype;
  problem.rows = kRows;
  problem.vocab = c.vocab;
  problem.valid_vocab = c.valid;
  Results results;
  for (int k = 0; k < kOutputs; ++k) results.column[k] = wants(c, k) ? &results : nullptr;
  Gradient gradient;
  gradient.out_dtype = c.out_dtype;
  Device device = real_device;
  while (device.shared_per_block > 512) {
    const Plan how = plan(c.operation, problem, results, gradient, device);
    const std::string name = "cluster" + std::to_string(how.cluster);
    if (how.resident && found.back().name != name) found.push_back({name, device});
    device.shared_per_block = device.shared_per_block * 7 / 8;
  }
  return found;
}

void add_cases(std::vector<Case>& cases, Case c, const Device& device) {
  for (const Path& path : paths(c, device)) {
    c.device = path.device;
    c.path = path.name;
    cases.push_back(c);
  }
}

std::vector<Case> all_cases(const Device& device) {
  std::vector<Case> cases;
  for (const Operation operation :
       {Operation::statistics, Operation::gradient, Operation::loss})
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64})
      for (const bool full : {false, true})
        for (const int64_t vocab : {1, 9, 4096, 20011, 90011}) {
          // Odd sizes have unaligned rows; in the long ones the last entries are not valid. The
          // longest are shared by blocks, which those of a loss are anyway.
          if (vocab > 84000 && operation == Operation::loss) continue;
          const int64_t valid = vocab > 9 ? vocab - 5 : vocab;
          Case c{operation, dtype, dtype, full, false, 0, vocab, valid, device, ""};
          add_cases(cases, c, device);
          if (operation == Operation::statistics || vocab < 2000 || vocab > 84000) continue;
          c.apart = 1;
          add_cases(cases, c, device);
          c.apart = 0;
          c.in_place = true;
          add_cases(cases, c, device);
          if (dtype != DType::f32) continue;
          for (const DType narrow : {DType::bf16, DType::f16}) {
            c.out_dtype = narrow;
            add_cases(cases, c, device);
          }
        }
  return cases;
}

}  // namespace

int main(int count, char** arguments) {
  const bool given = count == 3 && std::string(arguments[1]) == "--from";
  if (count != 1 && !given) {
    std::fprintf(stderr, "usage: cases [--from N]\n");
    return 2;
  }
  const size_t first = given ? std::strtoull(arguments[2], nullptr, 10) : 0;
  size_t done = 0, failed = 0;
  try {
    const std::vector<Case> cases = all_cases(device(0));
    for (size_t number = first; number < cases.size(); ++number, ++done) {
      const Case& c = cases[number];
      std::string said;
      bool good = false;
#if defined(EM_EMULATED)
      running = int64_t(number);
#endif
      try {
        const double error = run_case(c);
        char text[64];
        std::snprintf(text, sizeof text, "%.2g of what is allowed", error);
        said = text;
        good = error <= 1;
      } catch (const std::exception& reason) {
        said = reason.what();
      }
      failed += !good;
      std::printf("%-6s %s: %s\n", good ? "ok" : "FAILED", c.name().c_str(), said.c_str());
      std::fflush(stdout);
      if (!good && lost()) {
        std::printf("the device is lost; --from %zu goes on\n", number + 1);
        return 1;
      }
    }
  } catch (const std::exception& reason) {
    std::printf("FAILED cases: %s\n", reason.what());
    return 1;
  }
  std::printf("%zu cases, %zu failed\n", done, failed);
  return failed ? 1 : 0;
}

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
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "cuda_truth.h"

namespace {

using namespace cases;

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

// What a case is given, and what it must find: one row by its formulas, in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda_memory.h"

namespace cases {

// Random, with -inf, masked, nearly certain, with a NaN, target excluded, so large that z is beyond
// the dtype, denormal.
constexpr int kRows = 8;
constexpr int kMasked = 2, kNaN = 4;
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int64_t kGuard = 8;  // entries between rows, and after the last, that nothing may touch
inline const char* const kDTypes[] = {"float32", "bfloat16", "float16", "float64"};
inline const char* const kOperations[] = {"stats", "grad", "loss"};

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

inline Inputs make_inputs(const Case& c) {
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

inline Truth truth(const Case& c, const Inputs& in, int row) {
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

// Row i of a tensor begins here; a vocabulary that is not a multiple of 8 gives unaligned rows.
inline int64_t row_start(const Case& c, int row) { return kGuard + row * (c.vocab + kGuard); }

// Logits with a guard of 1 around every row.
inline std::vector<char> with_guards(const Case& c, const Inputs& in) {
  std::vector<double> all(row_start(c, kRows), 1);
  for (int row = 0; row < kRows; ++row)
    std::copy(in.x[row].begin(), in.x[row].end(), all.begin() + row_start(c, row));
  return bytes_of(c.dtype, all);
}

inline bool wants(const Case& c, int output) {
  if (c.operation == Operation::gradient) return false;
  return c.full || output <= kLse;
}

}  // namespace cases

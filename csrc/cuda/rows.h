// One row: where it lies, its transform from x to u, its results and the terms of its gradient.
#pragma once

#include <limits>

#include "sums.h"

namespace em_kernels::cuda {

template <class In>
struct RealOf {
  using Type = float;
};
template <>
struct RealOf<double> {
  using Type = double;
};
template <class In>
using Real = typename RealOf<In>::Type;

EM_DEVICE int64_t row_offset(int64_t row, int64_t inner, int64_t outer_stride, int64_t stride) {
  const int64_t outer = inner == 1 ? row : row / inner;
  return outer * outer_stride + (row - outer * inner) * stride;
}

// A call as the kernels see it, with what the host knows of u and c.
struct Call : Problem {
  double by;    // u = softcap(by x + bias)
  double gain;  // c, where rows have no temperature of their own; else c times that

  explicit Call(const Problem& p)
      : Problem(p), by(unit_scale(p)),
        gain(em_kernels::gain(p) / (p.temperature_rows ? 1 : p.temperature)) {}
};

// The numbers of a row that block `rank` has, where each has `size` of them.
struct Slice {
  int64_t begin;
  int count;

  EM_DEVICE Slice(const Problem& p, int rank, int64_t size) : begin(rank * size) {
    const int64_t rest = p.valid_vocab - begin;
    count = static_cast<int>(rest < 0 ? 0 : rest < size ? rest : size);
  }
  EM_DEVICE bool has(int64_t y) const { return begin <= y && y < begin + count; }
};

template <class T>
EM_DEVICE T read_row(const void* column, int64_t row) {
  return column ? static_cast<const T*>(column)[row] : T(0);
}

template <class T>
struct Transformed {
  T u, slope;  // slope = du / d(by x)
};

// tanh(v) and its derivative; the latter from e^-2|v|, which keeps its digits where tanh is near 1.
template <class T>
EM_DEVICE_CALL Transformed<T> tanh_and_slope(T v) {
  const T e = exp(-2 * fabs(v));
  return {tanh(v), 4 * e / ((1 + e) * (1 + e))};
}

// u = softcap(by x + bias) of the numbers of one row, and its c.
template <class T>
struct Transform {
  T by, softcap, inverse_cap, c;
  const T* bias;
  bool simple;  // u = by x

  // A c that is no normal number makes the row NaN.
  EM_DEVICE Transform(const Call& p, int64_t row)
      : by(p.by), softcap(p.softcap), inverse_cap(1 / softcap), c(p.gain),
        bias(static_cast<const T*>(p.bias)), simple(!p.bias && p.softcap == 0) {
    if (p.temperature_rows) c = c / read_row<T>(p.temperature_rows, row);
    using Limits = std::numeric_limits<T>;
    if (!(c >= Limits::min() && c <= Limits::max())) c = NAN;
  }

  EM_DEVICE Transformed<T> operator()(T x, int at) const {
    if (simple) return {multiply(x, by), 1};
    T u = multiply(x, by);
    if (bias) u += bias[at];
    if (softcap == 0) return {u, 1};
    if (u == T(INFINITY) || u == T(-INFINITY)) return {u, 0};
    const Transformed<T> capped = tanh_and_slope(u * inverse_cap);
    return {multiply(softcap, capped.u), capped.slope};
  }

  // That of the numbers from index `begin` on.
  EM_DEVICE Transform from(int64_t begin) const {
    Transform out = *this;
    if (bias) out.bias += begin;
    return out;
  }

  EM_DEVICE Scaling<T> scaling() const { return Scaling<T>(c); }
};

// The target y of a row, and u and its slope there. A target out of range makes the row NaN.
template <class T>
struct Target {
  int64_t y = -1;
  bool known = true;
  Transformed<T> at = {0, 0};

  template <class In>
  EM_DEVICE void read(const Call& p, int64_t row, const In* x, const Transform<T>& transform) {
    if (!p.target) return;
    y = p.target[row];
    known = 0 <= y && y < p.valid_vocab;
    if (known) at = transform(load_one(x + y), static_cast<int>(y));
  }
};

// What the gradient of a row needs of its statistics.
template <class T>
struct Saved {
  T max, log1p_r, mean_d;
};

template <class T>
EM_DEVICE void put(const Results& results, int name, int64_t row, T value) {
  if (results.column[name]) static_cast<T*>(results.column[name])[row] = value;
}

template <class T>
EM_DEVICE void put_zeros(const Results& results, int64_t row, int lane) {
  if (lane < kOutputs) put(results, lane, row, T(0));
}

// The outputs beyond the first order, in double: their formulas cancel where a row is certain.
template <class T>
EM_DEVICE void finalize_extras(const Part<T>& part, const Target<T>& target, T c, T* out) {
  const SoftmaxMoments<T>& x = part.softmax;
  const SoftmaxMoments<double> wide = {x.max, x.argmax, x.r, x.q, x.s, x.c2, x.t};
  double value[kOutputs];
  finalize(wide, part.logits.moments(), double(c), value);
  finalize_target(wide, c * (double(target.at.u) - wide.max), x.argmax == target.y, value);
#pragma unroll
  for (int name = 0; name < kOutputs; ++name)
    if (!is_first_order(name)) out[name] = T(value[name]);
}

// By a warp whose lanes have the same `part` and `target`: everything that was asked for of a row,
// an output a lane.
template <bool kExtras, class T>
EM_DEVICE Saved<T> put_row(
    const Results& results, int64_t row, const Part<T>& part, const Target<T>& target,
    const Scaling<T>& by, int lane) {
  const bool good = usable(part.softmax) && target.known && by.c == by.c;
  T value[kOutputs], own = NAN;
  finalize(part.softmax, LogitMoments<T>(), by.c, value);
  finalize_target(part.softmax, by.apart(target.at.u, part.softmax.max), false, value);
  if (kExtras) finalize_extras(part, target, by.c, value);
#pragma unroll
  for (int name = 0; name < kOutputs; ++name) {
    if (!good) value[name] = T(NAN);
    if ((kExtras || is_first_order(name)) && lane == name) own = value[name];
  }
  if (lane < kOutputs) put(results, lane, row, own);
  return {value[kMax], value[kLog1pR], value[kMeanD]};
}

// The weights of a row's outputs in the loss.
template <class T>
struct Upstream {
  T logprob, entropy, lse;
  bool of_target;

  EM_DEVICE Upstream(const Gradient& g, int64_t row)
      : logprob(read_row<T>(g.g_logprob, row)), entropy(read_row<T>(g.g_entropy, row)),
        lse(read_row<T>(g.g_lse, row)), of_target(g.g_logprob) {}
};

// The gradient e^d (a - b d) slope of every number, with d and b in units of log2, and that of the
// target.
template <class T>
struct GradientTerms {
  T max, a, b, at_target;
  bool has_target;

  EM_DEVICE GradientTerms(
      const Upstream<T>& g, const Saved<T>& saved, const Target<T>& target,
      const Transform<T>& transform) {
    // exp() forgets that a maximum was NaN.
    const T factor = saved.max == saved.max ? transform.by * transform.c : T(NAN);
    const T share = factor * exp(-saved.log1p_r);
    max = saved.max;
    a = share * multiply_add(g.entropy, saved.mean_d, g.lse - g.logprob);
    b = share * g.entropy * Scaling<T>::kLn2;
    has_target = g.of_target && target.known && target.y >= 0;
    at_target = 0;
    if (!has_target) return;
    // 1 - p as -expm1(log p): exact as p goes to 1.
    const T d = multiply(target.at.u - max, transform.c), log_p = d - saved.log1p_r, p = exp(log_p);
    T own = -g.logprob * expm1(log_p);
    if (p > 0) own += p * multiply_add(g.entropy, saved.mean_d - d, g.lse);
    at_target = factor * target.at.slope * own;
  }

  EM_DEVICE T operator()(const Transformed<T>& at, const Scaling<T>& by) const {
    const T d = by.distance(at.u, max);
    return power_of_2(d) * multiply_add(-b, d, a) * at.slope;
  }
};

}  // namespace em_kernels::cuda

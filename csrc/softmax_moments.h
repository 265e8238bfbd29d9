// The running accumulator of a softmax row, and the one associative operation on it.
//
// The logits of a row are z = c u, with
//
//     u = sign(logit_scale) x, c = |logit_scale| / T     where there is neither bias nor softcap
//     u = softcap(logit_scale x + bias), c = 1 / T       elsewhere
//
// so that nothing is multiplied, rounded or made infinite before the maximum is taken off. A part of
// a row (a block, a thread's share, a rank's vocabulary shard) with the maximum m of u, first
// attained at index a, and d_v = c (u_v - m), is summed up by
//
//     r = sum_{v != a} e^d_v             q = sum_{v != a} e^d_v d_v
//     s = sum_{v != a} e^d_v d_v^2       c2 = sum_{v != a} e^2d_v     t = sum_{v != a} e^2d_v d_v
//
// and its u, where their moments are asked for, by count, mean, spread and skew. `merge` gives the
// same of two parts together. The maximum itself is left out of every sum: that keeps relative
// accuracy when r is tiny. A part without a finite logit has max -inf and r 0. A NaN logit makes r
// NaN, a +inf logit makes max +inf, and every merge keeps that.
//
// These are the names in every backend, in C++, CUDA, Triton and plain PyTorch:
//
//     u, c, z              as above; the factor c is that of the row
//     max, argmax          m, in units of u, and a above; `m` where `max` is taken
//     held                 the maxima of lanes that are still apart
//     top                  the maximum on which sums are based, or re-based
//     d, e                 c (u - max), exp(d)
//     delta                c (the lesser maximum - the greater); of two means, the later - the
//                          earlier
//     r, q, s, c2, t       as above
//     mass, mean_d         1 + r, q / mass
//     count, mean          of the finite u
//     spread, skew         their standard deviation, and third moment over its cube, 0 if it is 0
//     shift, s1, s2, s3    sums of powers of u - shift, from which the mean is found
//     away                 u, or the mean of a part, less a shift or the mean of the whole
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define EM_HOST_DEVICE __host__ __device__
#else
#define EM_HOST_DEVICE
#endif

namespace em_kernels {

template <class T>
struct SoftmaxMoments {
  T max = -INFINITY;
  int64_t argmax = -1;
  T r = 0, q = 0;
  T s = 0, c2 = 0, t = 0;
};

// `low` re-based on the maximum of `high`, and added to it. Requires high.max >= low.max.
template <class T>
EM_HOST_DEVICE inline SoftmaxMoments<T> absorb(
    SoftmaxMoments<T> high, const SoftmaxMoments<T>& low, T c) {
  if (low.max == T(-INFINITY)) {
    high.r += low.r;
    return high;
  }
  // e is 0 long before -1000, and 0 times what lowest finite logits add up to must not be NaN.
  const T apart = c * (low.max - high.max);
  const T delta = apart < T(-1000) ? T(-1000) : apart;  // NaN stays
  const T e = std::exp(delta);
  high.r += e * (1 + low.r);
  high.q += e * (low.q + delta * (1 + low.r));
  high.s += e * (low.s + delta * (2 * low.q + delta * (1 + low.r)));
  high.c2 += e * e * (1 + low.c2);
  high.t += e * e * (low.t + delta * (1 + low.c2));
  return high;
}

// On ties the lower index is the argmax. Which is `high` is selected, not branched on: a GPU takes
// 60 instructions for it where two calls of `absorb` take 85.
template <class T>
EM_HOST_DEVICE inline SoftmaxMoments<T> merge(
    const SoftmaxMoments<T>& x, const SoftmaxMoments<T>& y, T c) {
  const bool x_leads = x.max > y.max || (x.max == y.max && x.argmax <= y.argmax);
  SoftmaxMoments<T> high = x, low = y;
  if (!x_leads) {
    high = y;
    low = x;
  }
  return absorb(high, low, c);
}

// Population moments. No power of u is held, so that none is infinite or 0 where they are not.
template <class T>
struct LogitMoments {
  T count = 0, mean = 0, spread = 0, skew = 0;
};

// In units of the largest of what is squared.
// Source: Chan, Golub, LeVeque (1979), eq. 2.1; Pebay, SAND2008-6212 (2008), eq. 2.1 for the third.
template <class T>
EM_HOST_DEVICE inline LogitMoments<T> merge(const LogitMoments<T>& x, const LogitMoments<T>& y) {
  if (y.count == 0) return x;
  if (x.count == 0) return y;
  LogitMoments<T> out;
  out.count = x.count + y.count;
  const T share_x = x.count / out.count, share_y = y.count / out.count;
  const T half = y.mean / 2 - x.mean / 2;  // of delta, which may be infinite
  out.mean = (x.mean + half * share_y) + half * share_y;
  const T spread = x.spread > y.spread ? x.spread : y.spread;
  const T unit = std::fabs(half) > spread ? std::fabs(half) : spread;
  if (unit == 0) return out;
  const T delta = 2 * (half / unit), a = x.spread / unit, b = y.spread / unit;
  const T var_x = a * a, var_y = b * b, between = share_x * share_y * delta;
  const T var = share_x * var_x + share_y * var_y + between * delta, root = std::sqrt(var);
  const T third = share_x * a * var_x * x.skew + share_y * b * var_y * y.skew +
                  between * (delta * delta * (share_x - share_y) + 3 * (var_y - var_x));
  out.spread = unit * root;
  out.skew = third / (var * root);
  return out;
}

// What a whole row reports, in the order of the public outputs; the first three are what the
// gradient needs.
enum Output : int {
  kMax,
  kLog1pR,
  kMeanD,
  kLogprob,
  kEntropy,
  kLse,
  kVarentropy,
  kCollision,
  kMaxProb,
  kIsTop1,
  kSelfCertainty,
  kLogitMean,
  kLogitVar,
  kLogitSkew,
  kEntropySlope,
  kOutputs,
};

// Whether r and q tell it, and nothing else of the logits: what the fastest kernels report.
EM_HOST_DEVICE constexpr bool is_first_order(int output) {
  return output <= kLse || output == kMaxProb;
}
static_assert(!is_first_order(kOutputs), "an output added at the end takes the other kernels");

// Whether the row has a finite maximum and no NaN or +inf in it.
template <class T>
EM_HOST_DEVICE inline bool usable(const SoftmaxMoments<T>& x) {
  return std::isfinite(x.max) && std::isfinite(x.r);
}

// Everything that needs no target, into out[kOutputs]: the maximum in units of u, all else in those
// of z.
template <class T>
EM_HOST_DEVICE inline void finalize(
    const SoftmaxMoments<T>& x, const LogitMoments<T>& logits, T c, T* out) {
  const T mass = 1 + x.r;
  const T log1p_r = std::log1p(x.r);
  const T mean_d = x.q / mass;
  out[kMax] = x.max;
  out[kLog1pR] = log1p_r;
  out[kMeanD] = mean_d;
  out[kEntropy] = log1p_r - mean_d;
  out[kLse] = c * x.max + log1p_r;
  out[kMaxProb] = 1 / mass;
  out[kCollision] = (1 + x.c2) / (mass * mass);
  out[kVarentropy] = x.s / mass - mean_d * mean_d;
  const T spread = c * logits.spread;
  out[kLogitMean] = c * logits.mean;
  out[kLogitVar] = spread * spread;
  out[kLogitSkew] = logits.skew;
  out[kSelfCertainty] = c * (x.max - logits.mean) + log1p_r - std::log(logits.count);
}

// What needs the target y, whose d_y is given (-inf for an excluded logit).
// entropy_slope = -[p_y (l_y + H) - sum p^2 (l + H)], where l_v + H = d_v - mean_d.
template <class T>
EM_HOST_DEVICE inline void finalize_target(
    const SoftmaxMoments<T>& x, T d_target, bool is_top1, T* out) {
  const T mass = 1 + x.r;
  const T mean_d = x.q / mass;
  const T p = std::exp(d_target) / mass;
  const T own = p > 0 ? p * (d_target - mean_d) : 0;
  out[kLogprob] = d_target - std::log1p(x.r);
  out[kIsTop1] = is_top1 ? 1 : 0;
  out[kEntropySlope] = (x.t - mean_d * (1 + x.c2)) / (mass * mass) - own;
}

}  // namespace em_kernels

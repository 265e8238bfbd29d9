// Count, mean, variance and skewness of the numbers above -inf: sums of one thread, and their merge.
//
// They are sums of powers of (u - shift) / unit, where `shift` is the thread's first number and
// `unit` a power of two not far below the largest |u - shift|: so neither cubes of 1e20 nor of
// denormal numbers leave the range, and scaling rounds nothing that counts.
// Source of the merge: Chan, Golub, LeVeque (1979), eq. 2.1; Pebay, SAND2008-6212 (2008), eq. 2.1.
#pragma once

#include "device.h"

namespace em_kernels::cuda {

// The greatest power of two <= size that, as its inverse, is a normal number, at least one, and so
// large that v over it is no more than what its digits tell apart. `v` may be -inf.
template <class T>
EM_DEVICE T power_below(T size, T v) {
  constexpr bool narrow = sizeof(T) == 4;
  constexpr int most = narrow ? 126 : 1022;
  if (v > T(-INFINITY)) size = at_least(size, T(fabs(v)) * T(narrow ? 0x1p-24 : 0x1p-53));
  const int exponent = ilogb(size);
  return ldexp(T(1), exponent < -most ? -most : exponent > most ? most : exponent);
}

// |u - v| / 2, which is finite; 0 where v is -inf.
template <class T>
EM_DEVICE T half_apart(T u, T v) {
  return v > T(-INFINITY) ? T(fabs(T(0.5) * u - T(0.5) * v)) : T(0);
}

// Mean and sums of powers about it, from the shift and in units.
template <class T>
struct CentredSums {
  T shift = -INFINITY, unit = 0, count = 0, mean = 0, m2 = 0, m3 = 0;

  // In another unit, not less than its own.
  EM_DEVICE void change_unit(T to) {
    const T by = unit / to;
    mean *= by;
    m2 *= by * by;
    m3 *= by * by * by;
    unit = to;
  }

  EM_DEVICE LogitMoments<double> moments() const {
    const double var = double(m2) / count, root = std::sqrt(var);
    return {
        double(count), 2 * (double(shift) / 2 + double(unit) / 2 * mean), unit * root,
        var > 0 ? m3 / double(count) / (var * root) : 0};
  }
};

template <class T>
EM_DEVICE CentredSums<T> merge(CentredSums<T> x, CentredSums<T> y) {
  if (y.count == 0) return x;
  if (x.count == 0) return y;
  T unit = power_below(half_apart(y.shift, x.shift), x.shift);
  unit = at_least(unit, at_least(x.unit, y.unit));
  x.change_unit(unit);
  y.change_unit(unit);
  const T inverse = 1 / unit, count = x.count + y.count;
  const T delta = y.shift * inverse - x.shift * inverse + y.mean - x.mean;
  const T share_x = x.count / count, share_y = y.count / count;
  const T spread = delta * delta * x.count * share_y;
  x.m3 += y.m3 + delta * (spread * (share_x - share_y) + 3 * (share_x * y.m2 - share_y * x.m2));
  x.m2 += y.m2 + spread;
  x.mean += delta * share_y;
  x.count = count;
  return x;
}

template <class T>
struct PowerSums {
  T shift = -INFINITY, unit = 0, count = 0, s1 = 0, s2 = 0, s3 = 0;

  template <class V, int N>
  EM_DEVICE void add(const V (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N * V::width; ++i) shift = shift > T(-INFINITY) ? shift : number(x, i);
    T least = shift, most = shift;
#pragma unroll
    for (int i = 0; i < N * V::width; ++i) {
      const T u = number(x, i);
      least = smaller(least, u > T(-INFINITY) ? u : shift);
      most = at_least(most, u);
    }
    grow(power_below(at_least(half_apart(least, shift), half_apart(most, shift)), shift));
    const T inverse = 1 / unit, base = shift > T(-INFINITY) ? shift * inverse : T(0);
#pragma unroll
    for (int i = 0; i < N * V::width; ++i) {
      const T u = number(x, i), away = u > T(-INFINITY) ? u * inverse - base : T(0);
      count += u > T(-INFINITY) ? 1 : 0;
      s1 += away;
      s2 = multiply_add(away, away, s2);
      s3 = multiply_add(away * away, away, s3);
    }
  }

  EM_DEVICE CentredSums<T> centred() const {
    CentredSums<T> out;
    if (count == 0) return out;
    const T mean = s1 / count;
    out.shift = shift;
    out.unit = unit;
    out.count = count;
    out.mean = mean;
    out.m2 = at_least(s2 - mean * s1, T(0));
    out.m3 = s3 - mean * (3 * s2 - 2 * mean * s1);
    return out;
  }

 private:
  template <class V, int N>
  static EM_DEVICE T number(const V (&x)[N], int i) {
    return x[i / V::width].get(i % V::width);
  }

  EM_DEVICE void grow(T to) {
    if (to <= unit) return;
    const T by = unit / to;
    s1 *= by;
    s2 *= by * by;
    s3 *= by * by * by;
    unit = to;
  }
};

}  // namespace em_kernels::cuda

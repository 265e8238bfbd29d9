// A row is worked through in blocks of fixed size, each summed relative to its own maximum and then
// merged in order: the result of a row depends on nothing but the row. A block is first transformed
// to u in a buffer that stays in the first-level cache (or taken in place where u = x), then read
// again for the sums. Included inside the namespace of a level.

constexpr int kUnroll = 4;

template <class V>
constexpr int64_t kStep = int64_t(kUnroll) * V::width;

template <class T>
struct Block {
  const T* u;    // padded with -inf to a multiple of kStep
  int64_t size;  // padded
  T max;
};

template <class T>
struct alignas(64) Scratch {
  T u[kBlock];
};

// What the sums fetch into the cache while they compute: the block that comes next, of entries of
// this size.
struct Prefetch {
  const char* start;
  int64_t bytes;

  Prefetch skip(int64_t count) const { return {start + count * bytes, bytes}; }
  template <int64_t Count>
  EM_INLINE void fetch(int64_t begin) const {
    const char* at = start + begin * bytes;
    for (int64_t i = 0; i < 2 * Count; i += 64) EM_PREFETCH(at + i);
    for (int64_t i = 2 * Count; i < bytes * Count; i += 64) EM_PREFETCH(at + i);
  }
};

template <class V>
EM_INLINE double total(const V (&parts)[kUnroll]) {
  typename V::T lane[V::width];
  ((parts[0] + parts[1]) + (parts[2] + parts[3])).store(lane);
  double sum = 0;
  for (int i = 0; i < V::width; ++i) sum += double(lane[i]);
  return sum;
}

template <class V>
EM_INLINE typename V::T largest(const V (&parts)[kUnroll]) {
  typename V::T lane[V::width];
  max_or_b(max_or_b(parts[0], parts[1]), max_or_b(parts[2], parts[3])).store(lane);
  return *std::max_element(lane, lane + V::width);
}

// One vector of logits of which only `count` exist; the others become -inf.
template <Kind K, class V, class In, class T>
static void transform_tail(const In* x, const T* bias, int64_t count, const Transform<T>& f, T* u) {
  In x_pad[V::width] = {};
  T bias_pad[V::width] = {};
  std::copy(x, x + count, x_pad);
  if (bias) std::copy(bias, bias + count, bias_pad);
  transform<K>(V::load(x_pad), bias ? bias_pad : nullptr, f).u.store(u);
  std::fill(u + count, u + V::width, -std::numeric_limits<T>::infinity());
}

template <class V, class T>
static Block<T> find_max(const T* u, int64_t size) {
  V max[kUnroll];
  for (V& m : max) m = V::set(-std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < size; i += kStep<V>)
    for (int j = 0; j < kUnroll; ++j) max[j] = max_or_b(V::load(u + i + j * V::width), max[j]);
  return {u, size, largest(max)};
}

template <Kind K, class V, class In, class T>
static Block<T> load_block(
    const In* x, const T* bias, int64_t count, const Transform<T>& f, T* scratch) {
  if constexpr (K == Kind::Plain && std::is_same_v<In, T>) {
    if (count % kStep<V> == 0) return find_max<V>(x, count);
  }
  const int64_t whole = count / V::width * V::width;
  for (int64_t i = 0; i < whole; i += V::width)
    transform<K>(V::load(x + i), bias ? bias + i : nullptr, f).u.store(scratch + i);
  if (whole < count)
    transform_tail<K, V>(
        x + whole, bias ? bias + whole : nullptr, count - whole, f, scratch + whole);
  const int64_t filled = (count + V::width - 1) / V::width * V::width;
  const int64_t padded = (count + kStep<V> - 1) / kStep<V> * kStep<V>;
  std::fill(scratch + filled, scratch + padded, -std::numeric_limits<T>::infinity());
  return find_max<V>(scratch, padded);
}

// The index of the first logit equal to the block's maximum.
template <class V, class T>
static int64_t find_first_max(const Block<T>& block) {
  const V max = V::set(block.max);
  int64_t i = 0;
  for (; i + kStep<V> < block.size; i += kStep<V>) {
    V m = V::load(block.u + i);
    for (int j = 1; j < kUnroll; ++j) m = max_or_b(V::load(block.u + i + j * V::width), m);
    if (V::any(m == max)) break;
  }
  return std::find(block.u + i, block.u + block.size, block.max) - block.u;
}

// 16-bit entries as they lie in memory: u = x, or -x of rows that are negated.
template <class In>
struct RawBlock {
  const In* x;   // padded with what is excluded to a multiple of kStep
  int64_t size;  // padded
  float peak;    // the x of the largest u
  bool negated;
  bool near;  // whether e^d is a normal number of every entry
  float max;  // of u
};

template <class In>
static float of_key(int16_t key) {
  return to_float(In{uint16_t(key_of(uint16_t(key)))});
}

// False for a block with a NaN, or an infinite u that is not excluded, in it.
template <Kind K, class V, class In>
static bool find_raw(const In* x, int64_t count, float c, In* padded, RawBlock<In>& block) {
  constexpr bool negated = K == Kind::Negated;
  constexpr float inf = std::numeric_limits<float>::infinity();
  const int64_t size = (count + kStep<V> - 1) / kStep<V> * kStep<V>;
  if (size != count) {
    In excluded;
    from_float(negated ? inf : -inf, &excluded);
    std::copy(x, x + count, padded);
    std::fill(padded + count, padded + size, excluded);
    x = padded;
  }
  const Keys keys = find_keys(&x->bits, size);
  const float low = of_key<In>(keys.least), high = of_key<In>(keys.greatest);
  const float peak = negated ? low : high, far = negated ? high : low;
  block = {x, size, peak, negated, c * std::fabs(far - peak) < 87, negated ? -peak : peak};
  return !std::isnan(low) && !std::isnan(high) && std::fabs(peak) < inf;
}

template <class V, class In>
static int64_t find_first_max(const RawBlock<In>& block) {
  In peak;
  from_float(block.peak, &peak);
  const uint16_t bits = peak.bits, read = block.peak == 0 ? 0x7fff : 0xffff;  // 0 and -0 are equal
  return find_bits(&block.x->bits, block.size, bits, read);
}

// What is known of all d of a block: nothing, that e^d is a normal number, or that c is 1 too.
enum class Reach { Any, Near, NearUnit };

template <bool SecondOrder, class V>
struct ExpSums {
  using T = typename V::T;
  V r[kUnroll], q[kUnroll], s[kUnroll], c2[kUnroll], t[kUnroll];

  ExpSums() {
    for (int j = 0; j < kUnroll; ++j) r[j] = q[j] = s[j] = c2[j] = t[j] = V::set(T(0));
  }

  // Of d = c (x - peak).
  template <Reach R, class In>
  EM_INLINE void add(const In* x, int64_t size, T peak, T c, const Prefetch& next) {
    for (int64_t i = 0; i < size; i += kStep<V>) {
      next.template fetch<kStep<V>>(i);
      V from[kUnroll];
      for (int j = 0; j < kUnroll; j += 2)
        load_two(x + i + j * V::width, from[j], from[j + 1]);
      for (int j = 0; j < kUnroll; ++j) {
        V d = from[j] - V::set(peak);
        if constexpr (R != Reach::NearUnit) d = V::set(c) * d;
        if constexpr (R == Reach::Any) d = clamp_exponent(d);
        const V e = vexp(d);
        r[j] = r[j] + e;
        q[j] = fma(e, d, q[j]);
        if constexpr (SecondOrder) {
          const V e2 = e * e;
          s[j] = fma(e * d, d, s[j]);
          c2[j] = c2[j] + e2;
          t[j] = fma(e2, d, t[j]);
        }
      }
    }
  }

  // Of all entries but the one at `argmax`; the few around it are summed from a copy in which it is
  // `excluded`.
  template <Reach R, class In>
  EM_INLINE void add_others(
      const In* x, int64_t size, int64_t argmax, T peak, T c, In excluded, const Prefetch& next) {
    const int64_t before = argmax / kStep<V> * kStep<V>, after = before + kStep<V>;
    In around[kStep<V>];
    std::copy(x + before, x + after, around);
    around[argmax - before] = excluded;
    add<R>(x, before, peak, c, next);
    add<Reach::Any>(around, kStep<V>, peak, c, next.skip(before));
    add<R>(x + after, size - after, peak, c, next.skip(after));
  }

  void put(SoftmaxMoments<double>& out) const {
    out.r = total(r);
    out.q = total(q);
    if constexpr (SecondOrder) {
      out.s = total(s);
      out.c2 = total(c2);
      out.t = total(t);
    }
  }
};

// The sums of SoftmaxMoments. A block without a finite u sums to 0, or NaN if there is one in it.
template <bool SecondOrder, class V, class T>
static SoftmaxMoments<double> exp_sums(const Block<T>& block, T c, const Prefetch& next) {
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  SoftmaxMoments<double> out;
  ExpSums<SecondOrder, V> sums;
  if (block.max == lowest) {
    sums.template add<Reach::Any>(block.u, block.size, T(0), c, next);
  } else {
    out.max = block.max;
    out.argmax = find_first_max<V>(block);
    sums.template add_others<Reach::Any>(
        block.u, block.size, out.argmax, block.max, c, lowest, next);
  }
  sums.put(out);
  return out;
}

template <bool SecondOrder, class V, class In>
static SoftmaxMoments<double> exp_sums(const RawBlock<In>& block, float c, const Prefetch& next) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  SoftmaxMoments<double> out;
  ExpSums<SecondOrder, V> sums;
  In excluded;
  from_float(block.negated ? inf : -inf, &excluded);
  const float by = block.negated ? -c : c;
  out.max = block.max;
  out.argmax = find_first_max<V>(block);
  const auto add = [&](auto reach) {
    sums.template add_others<reach>(
        block.x, block.size, out.argmax, block.peak, by, excluded, next);
  };
  if (!block.near) {
    add(std::integral_constant<Reach, Reach::Any>{});
  } else if (by == 1) {
    add(std::integral_constant<Reach, Reach::NearUnit>{});
  } else {
    add(std::integral_constant<Reach, Reach::Near>{});
  }
  sums.put(out);
  return out;
}

// The power of two, nearly, that takes numbers of this range to the size of 1: what is multiplied by
// it is exact, its cube finite and not 0.
template <class T>
static T unit_of(T lowest, T highest) {
  using Limits = std::numeric_limits<T>;
  const T range = std::min(highest - lowest, Limits::max());
  if (!(range > 0)) return 1;
  const int most = Limits::max_exponent - 2;
  return std::ldexp(T(1), std::clamp(-std::ilogb(range), -most, most));
}

// Sums about a shift near the mean, in a unit of the size of the range, corrected to the mean
// afterwards.
template <class V, class T>
static LogitMoments<double> logit_moments(const Block<T>& block) {
  const V zero = V::set(T(0)), one = V::set(T(1));
  const V excluded = V::set(-std::numeric_limits<T>::infinity());
  V count[kUnroll], least[kUnroll], s1[kUnroll], s2[kUnroll], s3[kUnroll];
  for (int j = 0; j < kUnroll; ++j) {
    count[j] = s1[j] = s2[j] = s3[j] = zero;
    least[j] = V::set(-block.max);
  }
  for (int64_t i = 0; i < block.size; i += kStep<V>) {
    for (int j = 0; j < kUnroll; ++j) {
      const V u = V::load(block.u + i + j * V::width);
      const auto out = u == excluded;
      count[j] = count[j] + select(out, zero, one);
      least[j] = max_or_b(least[j], select(out, least[j], zero - u));
    }
  }
  LogitMoments<double> out;
  out.count = total(count);
  if (out.count == 0) return out;
  const T unit = unit_of(T(-largest(least)), block.max);
  const V by = V::set(unit);
  // sum(u unit - from), of the finite u
  const auto sum_from = [&](V from) {
    for (V& sum : s1) sum = zero;
    for (int64_t i = 0; i < block.size; i += kStep<V>) {
      for (int j = 0; j < kUnroll; ++j) {
        const V u = V::load(block.u + i + j * V::width);
        s1[j] = s1[j] + select(u == excluded, zero, u * by - from);
      }
    }
    return total(s1);
  };
  const T top = block.max * unit, shift = T(top + sum_from(V::set(top)) / out.count);
  for (V& sum : s1) sum = zero;
  for (int64_t i = 0; i < block.size; i += kStep<V>) {
    for (int j = 0; j < kUnroll; ++j) {
      const V u = V::load(block.u + i + j * V::width);
      const V away = select(u == excluded, zero, u * by - V::set(shift));
      const V square = away * away;
      s1[j] = s1[j] + away;
      s2[j] = s2[j] + square;
      s3[j] = fma(square, away, s3[j]);
    }
  }
  const double offset = total(s1) / out.count, square = total(s2) / out.count;
  const double var = std::max(0.0, square - offset * offset);
  const double third = total(s3) / out.count - offset * (3 * square - 2 * offset * offset);
  out.mean = (double(shift) + offset) / unit;
  out.spread = std::sqrt(var) / unit;
  out.skew = var > 0 ? third / (var * std::sqrt(var)) : 0;
  return out;
}

// The gradient of a row is gx = e^d (constant + linear d) slope, except at the target.
template <class T>
struct RowGradient {
  T max, c, constant, linear;
};

template <Kind K, class V, class In, class Out, class T>
static EM_INLINE void grad_vector(
    const In* x, const T* bias, const Transform<T>& f, const RowGradient<T>& g, Out* out) {
  const Transformed<V> at = transform<K>(V::load(x), bias, f);
  const V d = distance(at.u, V::set(g.max), V::set(g.c));
  V gx = vexp(d) * fma(V::set(g.linear), d, V::set(g.constant));
  if constexpr (K == Kind::General) gx = gx * at.slope;
  gx.store(out);
}

// `out` may begin where `x` does, and be narrower.
template <Kind K, class V, class In, class Out, class T>
static void grad_block(
    const In* x, const T* bias, int64_t count, const Transform<T>& f, const RowGradient<T>& g,
    Out* out) {
  const int64_t whole = count / V::width * V::width;
  int64_t i = 0;
  for (; i + kStep<V> <= whole; i += kStep<V>)
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t at = i + j * V::width;
      grad_vector<K, V>(x + at, bias ? bias + at : nullptr, f, g, out + at);
    }
  for (; i < whole; i += V::width)
    grad_vector<K, V>(x + i, bias ? bias + i : nullptr, f, g, out + i);
  if (whole == count) return;
  In x_pad[V::width] = {};
  T bias_pad[V::width] = {};
  std::copy(x + whole, x + count, x_pad);
  if (bias) std::copy(bias + whole, bias + count, bias_pad);
  Out out_pad[V::width];
  grad_vector<K, V>(x_pad, bias ? bias_pad : nullptr, f, g, out_pad);
  std::copy(out_pad, out_pad + (count - whole), out + whole);
}

// A row is worked through in blocks of fixed size, each summed relative to its own maximum and then
// merged in order: the result of a row depends on nothing but the row. A block is first transformed
// to logits z in a buffer that stays in the first-level cache (or taken in place where z = x), then
// read again for the sums. Included inside the namespace of a level.

constexpr int kUnroll = 4;

template <class V>
constexpr int64_t kStep = int64_t(kUnroll) * V::width;

template <class T>
struct Block {
  const T* z;   // padded with -inf to a multiple of kStep
  int64_t size;  // padded
  T max;
};

template <class T>
struct alignas(64) Scratch {
  T z[kBlock];
};

// What the sums fetch into the cache while they compute: the block that comes next.
struct Prefetch {
  const char* start;
  int64_t element_bytes;

  Prefetch skip(int64_t count) const { return {start + count * element_bytes, element_bytes}; }
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
static void transform_tail(const In* x, const T* bias, int64_t count, const Transform<T>& f, T* z) {
  In x_pad[V::width] = {};
  T bias_pad[V::width] = {};
  std::copy(x, x + count, x_pad);
  if (bias) std::copy(bias, bias + count, bias_pad);
  transform<K>(V::load(x_pad), bias ? bias_pad : nullptr, f).z.store(z);
  std::fill(z + count, z + V::width, -std::numeric_limits<T>::infinity());
}

template <class V, class T>
static Block<T> find_max(const T* z, int64_t size) {
  V max[kUnroll];
  for (V& m : max) m = V::set(-std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < size; i += kStep<V>)
    for (int j = 0; j < kUnroll; ++j) max[j] = max_or_b(V::load(z + i + j * V::width), max[j]);
  return {z, size, largest(max)};
}

template <Kind K, class V, class In, class T>
static Block<T> load_block(
    const In* x, const T* bias, int64_t count, const Transform<T>& f, T* scratch) {
  if constexpr (K == Kind::Identity && std::is_same_v<In, T>) {
    if (count % kStep<V> == 0) return find_max<V>(x, count);
  }
  const int64_t whole = count / V::width * V::width;
  for (int64_t i = 0; i < whole; i += V::width)
    transform<K>(V::load(x + i), bias ? bias + i : nullptr, f).z.store(scratch + i);
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
    V m = V::load(block.z + i);
    for (int j = 1; j < kUnroll; ++j) m = max_or_b(V::load(block.z + i + j * V::width), m);
    if (V::any(m == max)) break;
  }
  return std::find(block.z + i, block.z + block.size, block.max) - block.z;
}

template <bool SecondOrder, class V>
struct ExpSums {
  using T = typename V::T;
  V r[kUnroll], q[kUnroll], s[kUnroll], c[kUnroll], t[kUnroll];

  ExpSums() {
    for (int j = 0; j < kUnroll; ++j) r[j] = q[j] = s[j] = c[j] = t[j] = V::set(T(0));
  }

  EM_INLINE void add(const T* z, int64_t size, T max, const Prefetch& next) {
    for (int64_t i = 0; i < size; i += kStep<V>) {
      for (int j = 0; j < kUnroll; ++j) {
        EM_PREFETCH(next.start + (i + j * V::width) * next.element_bytes);
        const V d = clamp_exponent(V::load(z + i + j * V::width) - V::set(max));
        const V e = vexp(d);
        r[j] = r[j] + e;
        q[j] = fma(e, d, q[j]);
        if constexpr (SecondOrder) {
          const V e2 = e * e;
          s[j] = fma(e * d, d, s[j]);
          c[j] = c[j] + e2;
          t[j] = fma(e2, d, t[j]);
        }
      }
    }
  }
};

// The sums of SoftmaxMoments. The few vectors around the maximum are summed from a copy in which it
// is -inf. A block without a finite logit sums to 0, or NaN if there is one in it.
template <bool SecondOrder, class V, class T>
static SoftmaxMoments<double> exp_sums(const Block<T>& block, const Prefetch& next) {
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  SoftmaxMoments<double> out;
  ExpSums<SecondOrder, V> sums;
  if (block.max == lowest) {
    sums.add(block.z, block.size, T(0), next);
  } else {
    out.max = block.max;
    out.argmax = find_first_max<V>(block);
    const int64_t before = out.argmax / kStep<V> * kStep<V>, after = before + kStep<V>;
    T around[kStep<V>];
    std::copy(block.z + before, block.z + after, around);
    around[out.argmax - before] = lowest;
    sums.add(block.z, before, block.max, next);
    sums.add(around, kStep<V>, block.max, next.skip(before));
    sums.add(block.z + after, block.size - after, block.max, next.skip(after));
  }
  out.r = total(sums.r);
  out.q = total(sums.q);
  if constexpr (SecondOrder) {
    out.s = total(sums.s);
    out.c = total(sums.c);
    out.t = total(sums.t);
  }
  return out;
}

// Sums about a shift near the mean, corrected to the mean afterwards.
template <class V, class T>
static LogitMoments<double> logit_moments(const Block<T>& block) {
  const V zero = V::set(T(0)), one = V::set(T(1));
  const V lowest = V::set(-std::numeric_limits<T>::infinity());
  V count[kUnroll], s1[kUnroll], s2[kUnroll], s3[kUnroll];
  for (int j = 0; j < kUnroll; ++j) count[j] = s1[j] = s2[j] = s3[j] = zero;
  for (int64_t i = 0; i < block.size; i += kStep<V>) {
    for (int j = 0; j < kUnroll; ++j) {
      const V z = V::load(block.z + i + j * V::width);
      const auto excluded = z == lowest;
      count[j] = count[j] + select(excluded, zero, one);
      s1[j] = s1[j] + select(excluded, zero, z);
    }
  }
  LogitMoments<double> out;
  out.count = total(count);
  if (out.count == 0) return out;
  const T shift = T(total(s1) / out.count);
  for (V& sum : s1) sum = zero;
  for (int64_t i = 0; i < block.size; i += kStep<V>) {
    for (int j = 0; j < kUnroll; ++j) {
      const V z = V::load(block.z + i + j * V::width);
      const V away = select(z == lowest, zero, z - V::set(shift));
      const V square = away * away;
      s1[j] = s1[j] + away;
      s2[j] = s2[j] + square;
      s3[j] = fma(square, away, s3[j]);
    }
  }
  const double offset = total(s1) / out.count, square = total(s2);
  out.mean = double(shift) + offset;
  out.m2 = square - out.count * offset * offset;
  out.m3 = total(s3) - 3 * offset * square + 2 * out.count * offset * offset * offset;
  return out;
}

// The gradient of a row is gx = e^d (constant + linear d) slope, except at the target.
template <class T>
struct RowGradient {
  T max, constant, linear;
};

template <Kind K, class V, class In, class T>
static EM_INLINE void grad_vector(
    const In* x, const T* bias, const Transform<T>& f, const RowGradient<T>& g, In* out) {
  const Transformed<V> at = transform<K>(V::load(x), bias, f);
  const V d = clamp_exponent(at.z - V::set(g.max));
  V gx = vexp(d) * fma(V::set(g.linear), d, V::set(g.constant));
  if constexpr (K == Kind::General) gx = gx * at.slope;
  gx.store(out);
}

template <Kind K, class V, class In, class T>
static void grad_block(
    const In* x, const T* bias, int64_t count, const Transform<T>& f, const RowGradient<T>& g,
    In* out) {
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
  grad_vector<K, V>(x_pad, bias ? bias_pad : nullptr, f, g, x_pad);
  std::copy(x_pad, x_pad + (count - whole), out + whole);
}

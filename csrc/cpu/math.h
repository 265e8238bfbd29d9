// exp, tanh and the logit transform on vectors. Included inside the namespace of a level.

// e^d for d in [exp_floor, 0], and NaN for NaN; exactly 0 at exp_floor. Callers clamp to the floor:
// e^d is below the smallest normal number there, and -inf becomes an ordinary operand.
template <class T>
constexpr T exp_floor = sizeof(T) == 4 ? T(-88.03) : T(-750);

// The entries of two vectors, in any order.
template <class V, class In>
EM_INLINE void load_two(const In* x, V& a, V& b) {
  a = V::load(x);
  b = V::load(x + V::width);
}

// Float: e^d = 2^n e^f, n = round(d log2 e), f = d - n ln 2, and for |f| <= ln 2 / 2 a polynomial
// fitted to the least largest relative error (3.1e-9). Adding 1.5 * 2^23 + 127 rounds to an integer
// and leaves the biased exponent in the low bits; n = -127 gives 0.
template <class V>
EM_INLINE V vexp(V d) {
  const V magic = V::set(12583039.0f);
  const V k = fma(d, V::set(1.44269504f), magic);
  const V n = k - magic;
  const V f = minus_n_ln2(d, n);
  V p = V::set(0.00138144672f);
  p = fma(p, f, V::set(0.00836878084f));
  p = fma(p, f, V::set(0.0416683927f));
  p = fma(p, f, V::set(0.166665196f));
  p = fma(p, f, V::set(0.49999994f));
  p = fma(p, f, V::set(1.0f));
  p = fma(p, f, V::set(1.0f));
  return p * shift_to_exponent(k);
}

template <int W>
EM_INLINE Lanes<double, W> vexp(Lanes<double, W> d) {
  return Lanes<double, W>::make([&](int i) { return std::exp(d.lane[i]); });
}

template <class V>
EM_INLINE V clamp_exponent(V d) {
  return max_or_b(V::set(exp_floor<typename V::T>), d);
}

// d, no farther than e^d tells. The difference is exact, or rounded once, and 0 at the maximum.
template <class V>
EM_INLINE V distance(V u, V max, V c) {
  return clamp_exponent(c * (u - max));
}

// log y of y = 1 + less in (0, 1], to rounding in relative terms where less is near 0: of a y in
// [sqrt 1/2, 1] the polynomial takes `less`, else what is left of y over a power of two (Moshier,
// Cephes, logf).
template <class V>
EM_INLINE V vlog1p(V less, V y) {
  const V zero = V::set(0.0f), n = exponent_of(y * V::set(1.41421356f));
  const V scaled = y * shift_to_exponent(V::set(12583039.0f) - n);
  const V f = select(n == zero, less, scaled - V::set(1.0f));
  V p = V::set(7.0376836292e-2f);
  p = fma(p, f, V::set(-1.1514610310e-1f));
  p = fma(p, f, V::set(1.1676998740e-1f));
  p = fma(p, f, V::set(-1.2420140846e-1f));
  p = fma(p, f, V::set(1.4249322787e-1f));
  p = fma(p, f, V::set(-1.6668057665e-1f));
  p = fma(p, f, V::set(2.0000714765e-1f));
  p = fma(p, f, V::set(-2.4999993993e-1f));
  p = fma(p, f, V::set(3.3333331174e-1f));
  const V square = f * f;
  const V tail = fma(square * f, p, fma(square, V::set(-0.5f), n * V::set(-2.12194440e-4f)));
  return fma(n, V::set(0.693359375f), f + tail);
}

template <int W>
EM_INLINE Lanes<double, W> vlog1p(Lanes<double, W> less, Lanes<double, W> y) {
  return Lanes<double, W>::make(
      [&](int i) { return less.lane[i] < -0.5 ? std::log(y.lane[i]) : std::log1p(less.lane[i]); });
}

// e^-x - 1 + x for |x| < 0.5: a series, of positive terms or nearly so.
template <class V>
EM_INLINE V excess(V x) {
  const V minus = V::set(0.0f) - x;
  V s = V::set(float(1.0 / 3628800));
  s = fma(s, minus, V::set(float(1.0 / 362880)));
  s = fma(s, minus, V::set(float(1.0 / 40320)));
  s = fma(s, minus, V::set(float(1.0 / 5040)));
  s = fma(s, minus, V::set(float(1.0 / 720)));
  s = fma(s, minus, V::set(float(1.0 / 120)));
  s = fma(s, minus, V::set(float(1.0 / 24)));
  s = fma(s, minus, V::set(float(1.0 / 6)));
  s = fma(s, minus, V::set(0.5f));
  return x * x * s;
}

template <int W>
EM_INLINE Lanes<double, W> excess(Lanes<double, W> x) {
  return Lanes<double, W>::make([&](int i) {
    double term = 1 / 1307674368000.0, sum = term;  // 1 / 15!
    for (int k = 15; k > 2; --k) {
      term *= k;
      sum = term - x.lane[i] * sum;
    }
    return x.lane[i] * x.lane[i] * sum;
  });
}

// tanh for |x| < 0.625: odd polynomial of degree 11 (Moshier, Cephes, tanhf).
template <class V>
EM_INLINE V tanh_near_zero(V x) {
  const V x2 = x * x;
  V p = V::set(-5.70498872745e-3f);
  p = fma(p, x2, V::set(2.06390887954e-2f));
  p = fma(p, x2, V::set(-5.37397155531e-2f));
  p = fma(p, x2, V::set(1.33314422036e-1f));
  p = fma(p, x2, V::set(-3.33332819422e-1f));
  return fma(p * x2, x, x);
}

template <int W>
EM_INLINE Lanes<double, W> tanh_near_zero(Lanes<double, W> x) {
  return Lanes<double, W>::make([&](int i) { return std::tanh(x.lane[i]); });
}

// tanh x, and 1 - tanh^2 x without cancellation, from e = e^(-2 |x|).
template <class V>
struct Tanh {
  V value, slope;
};

template <class V>
EM_INLINE Tanh<V> vtanh(V x) {
  using T = typename V::T;
  const V one = V::set(T(1)), size = abs(x);
  const V e = vexp(clamp_exponent(size * V::set(T(-2))));
  const V inverse = one / (one + e);
  const V far = (one - e) * inverse;
  const V value = select(x < V::set(T(0)), V::set(T(0)) - far, far);
  const V slope = V::set(T(4)) * e * inverse * inverse;
  return {select(size < V::set(T(0.625)), tanh_near_zero(x), value), slope};
}

// Of one row, u = softcap(by x + bias) and z = c u; see softmax_moments.h. Plain and Negated are the
// cases worth their own code, u = x and u = -x.
enum class Kind { Plain, Negated, General };

template <class T>
struct Transform {
  const T* bias;
  T by, softcap;
  T c;      // NaN where no normal number holds it, as with a temperature that is not positive
  T dz_dx;  // but for the slope of the softcap

  Transform(const Problem& p, int64_t row)
      : bias(static_cast<const T*>(p.bias)), by(T(unit_scale(p))), softcap(T(p.softcap)) {
    using Limits = std::numeric_limits<T>;
    const T* rows = static_cast<const T*>(p.temperature_rows);
    const double wide = gain(p) / (rows ? double(rows[row]) : p.temperature);
    const bool good = double(Limits::min()) <= wide && wide <= double(Limits::max());
    c = good ? T(wide) : Limits::quiet_NaN();
    dz_dx = T(unit_scale(p) * double(c));
  }

  static Kind kind(const Problem& p) {
    if (!is_simple(p)) return Kind::General;
    return p.logit_scale > 0 ? Kind::Plain : Kind::Negated;
  }
};

// u, and du/dx up to the factor `by`, of the logits at vocabulary index v.
template <class V>
struct Transformed {
  V u, slope;
};

template <Kind K, class V, class T>
EM_INLINE Transformed<V> transform(V x, const T* bias, const Transform<T>& f) {
  const V one = V::set(T(1));
  if constexpr (K == Kind::Plain) return {x, one};
  if constexpr (K == Kind::Negated) return {V::set(T(0)) - x, one};
  V u = x * V::set(f.by);
  if (bias) u = u + V::load(bias);
  if (f.softcap == 0) return {u, one};
  const V cap = V::set(f.softcap);
  const Tanh<V> th = vtanh(u / cap);
  const auto infinite = abs(u) == V::set(std::numeric_limits<T>::infinity());
  return {select(infinite, u, cap * th.value), th.slope};
}

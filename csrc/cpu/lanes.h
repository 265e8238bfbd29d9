// Lanes<T, W>: the vector type in plain C++. It is the float vector of the portable level and the
// double vector of every level; it also says what the other vector types provide.
// Included inside the namespace of a level.

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <class To, class From>
EM_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &x, sizeof(To));
  return out;
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

static inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float value = float(magnitude & 0x3ff) * 0x1p-24f;
  if (magnitude < 0x400) return sign ? -value : value;
  return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000));
}

static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(double x, double* out) { *out = x; }

static inline void from_float(float x, bf16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  out->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void from_float(float x, f16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  const float size = std::fabs(x);
  uint32_t magnitude;
  if (x != x) {
    magnitude = 0x7e00;
  } else if (size >= 65520.0f) {
    magnitude = 0x7c00;
  } else if (size < 0x1p-14f) {
    magnitude = bit_cast<uint32_t>(size + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t rest = (bits & 0x7fffffff) - 0x38000000;
    magnitude = (rest + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(sign | magnitude);
}

template <class T_, int W>
struct Lanes {
  using T = T_;
  static constexpr int width = W;
  struct Mask {
    bool lane[W];
  };
  T lane[W];

  static EM_INLINE Lanes set(T x) {
    return make([&](int) { return x; });
  }
  static EM_INLINE Lanes load(const T* p) {
    return make([&](int i) { return p[i]; });
  }
  template <class Half>
  static EM_INLINE Lanes load(const Half* p) {
    return make([&](int i) { return to_float(p[i]); });
  }
  EM_INLINE void store(T* p) const {
    for (int i = 0; i < W; ++i) p[i] = lane[i];
  }
  template <class Half>
  EM_INLINE void store(Half* p) const {
    for (int i = 0; i < W; ++i) {
      Half half;
      from_float(lane[i], &half);
      std::memcpy(p + i, &half, sizeof(Half));  // there may be floats there, read before
    }
  }
  template <class F>
  static EM_INLINE Lanes make(F f) {
    Lanes out;
    for (int i = 0; i < W; ++i) out.lane[i] = f(i);
    return out;
  }

  friend EM_INLINE Lanes operator+(Lanes a, Lanes b) {
    return make([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  friend EM_INLINE Lanes operator-(Lanes a, Lanes b) {
    return make([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  friend EM_INLINE Lanes operator*(Lanes a, Lanes b) {
    return make([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  friend EM_INLINE Lanes operator/(Lanes a, Lanes b) {
    return make([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  // a * b + c; fused where the level has the instruction.
  friend EM_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }
  // The larger; b if either is NaN.
  friend EM_INLINE Lanes max_or_b(Lanes a, Lanes b) {
    return make([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  friend EM_INLINE Lanes abs(Lanes a) {
    return make([&](int i) { return std::fabs(a.lane[i]); });
  }
  friend EM_INLINE Mask operator<(Lanes a, Lanes b) {
    Mask out;
    for (int i = 0; i < W; ++i) out.lane[i] = a.lane[i] < b.lane[i];
    return out;
  }
  friend EM_INLINE Mask operator==(Lanes a, Lanes b) {
    Mask out;
    for (int i = 0; i < W; ++i) out.lane[i] = a.lane[i] == b.lane[i];
    return out;
  }
  friend EM_INLINE Lanes select(Mask mask, Lanes yes, Lanes no) {
    return make([&](int i) { return mask.lane[i] ? yes.lane[i] : no.lane[i]; });
  }
  static EM_INLINE bool any(Mask mask) {
    bool out = false;
    for (int i = 0; i < W; ++i) out |= mask.lane[i];
    return out;
  }
  // d - n ln 2 without loss, ln 2 cut in two (Cody and Waite).
  friend EM_INLINE Lanes minus_n_ln2(Lanes d, Lanes n) {
    return d - n * set(T(0.693359375)) + n * set(T(2.12194440e-4));
  }
  // floor(log2 x) of a positive normal float.
  friend EM_INLINE Lanes exponent_of(Lanes x) {
    return make([&](int i) { return T(std::ilogb(x.lane[i])); });
  }
  // The float whose bits are those of k shifted left by 23; see vexp.
  friend EM_INLINE Lanes shift_to_exponent(Lanes k) {
    return make([&](int i) { return bit_cast<T>(Bits<T>(bit_cast<Bits<T>>(k.lane[i]) << 23)); });
  }
};

// The bits of 16-bit floats in the order of the numbers; a NaN is beyond the infinity of its sign.
static inline int16_t key_of(uint16_t bits) {
  const int16_t x = int16_t(bits);
  return int16_t(x ^ ((x >> 15) & 0x7fff));
}

struct Keys {
  int16_t least, greatest;
};

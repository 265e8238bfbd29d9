// Sixteen floats in a zmm register; the interface is that of Lanes. Included inside a namespace.

struct F32 {
  using T = float;
  static constexpr int width = 16;
  using Mask = __mmask16;
  __m512 v;

  static EM_INLINE F32 set(float x) { return {_mm512_set1_ps(x)}; }
  static EM_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static EM_INLINE F32 load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static EM_INLINE F32 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
  }
  EM_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  EM_INLINE void store(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i out = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(out));
  }
  EM_INLINE void store(f16* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  friend EM_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend EM_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend EM_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend EM_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend EM_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend EM_INLINE F32 max_or_b(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend EM_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
  friend EM_INLINE Mask operator<(F32 a, F32 b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
  }
  friend EM_INLINE Mask operator==(F32 a, F32 b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
  }
  friend EM_INLINE F32 select(Mask mask, F32 yes, F32 no) {
    return {_mm512_mask_mov_ps(no.v, mask, yes.v)};
  }
  static EM_INLINE bool any(Mask mask) { return mask != 0; }
  friend EM_INLINE F32 exponent_of(F32 x) { return {_mm512_getexp_ps(x.v)}; }
  friend EM_INLINE F32 shift_to_exponent(F32 k) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(k.v), 23))};
  }
  // The table has the bits of 2^(k mod 16 / 16) less what k, moved to the exponent, adds to them.
  static constexpr int exp_parts = 16;
  friend EM_INLINE F32 part_power(F32 k) {
    const __m512i table = _mm512_setr_epi32(
        0, -152893, -289342, -408621, -509968, -592590, -655657, -698305, -719629, -718684,
        -694486, -646004, -572163, -471841, -343865, -187011);
    const __m512i bits = _mm512_castps_si512(k.v);
    return {_mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_permutexvar_epi32(bits, table), _mm512_slli_epi32(bits, 19)))};
  }
};

// The even and the odd entries.
EM_INLINE void load_two(const bf16* x, F32& a, F32& b) {
  const __m512i both = _mm512_loadu_si512(x);
  a = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
  b = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))};
}

// The polynomial is off by 1.6e-9; e is within 1.6 ulp for d > -20, 2.8 for d > -50, 4.9 for all
// normal e.
EM_INLINE F32 vexp(F32 d) { return vexp_in_parts(d, 0.500016153f, 0.166667193f); }

static inline Keys find_keys(const uint16_t* bits, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i least[2], greatest[2];
  for (int j = 0; j < 2; ++j) {
    least[j] = magnitude;
    greatest[j] = _mm512_set1_epi16(INT16_MIN);
  }
  for (int64_t i = 0; i < count; i += 64) {
    for (int j = 0; j < 2; ++j) {
      const __m512i x = _mm512_loadu_si512(bits + i + 32 * j);
      const __m512i sign = _mm512_srai_epi16(x, 15);
      const __m512i key = _mm512_ternarylogic_epi32(x, sign, magnitude, 0x78);  // x ^ (sign & ..)
      least[j] = _mm512_min_epi16(least[j], key);
      greatest[j] = _mm512_max_epi16(greatest[j], key);
    }
  }
  alignas(64) int16_t low[32], high[32];
  _mm512_store_si512(low, _mm512_min_epi16(least[0], least[1]));
  _mm512_store_si512(high, _mm512_max_epi16(greatest[0], greatest[1]));
  return {*std::min_element(low, low + 32), *std::max_element(high, high + 32)};
}

static inline int64_t find_bits(const uint16_t* b, int64_t count, uint16_t wanted, uint16_t read) {
  const __m512i bits = _mm512_set1_epi16(short(wanted & read)), mask = _mm512_set1_epi16(short(read));
  for (int64_t i = 0; i < count; i += 64) {
    const __m512i x = _mm512_and_si512(_mm512_loadu_si512(b + i), mask);
    const __m512i y = _mm512_and_si512(_mm512_loadu_si512(b + i + 32), mask);
    const __mmask32 low = _mm512_cmpeq_epi16_mask(x, bits), high = _mm512_cmpeq_epi16_mask(y, bits);
    const uint64_t found = uint64_t(high) << 32 | low;
    if (found) return i + __builtin_ctzll(found);
  }
  return count;
}

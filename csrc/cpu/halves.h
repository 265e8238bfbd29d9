// 16-bit floats as integers, in plain C++; vec_avx2.h and vec_avx512.h have their own of these.
// Included inside the namespace of a level.

static inline Keys find_keys(const uint16_t* bits, int64_t count) {
  Keys out{INT16_MAX, INT16_MIN};
  for (int64_t i = 0; i < count; ++i) {
    const int16_t key = key_of(bits[i]);
    out.least = std::min(out.least, key);
    out.greatest = std::max(out.greatest, key);
  }
  return out;
}

// The first of them, a multiple of 16, that has the wanted bits among those to read; there is one.
static inline int64_t find_bits(
    const uint16_t* bits, int64_t count, uint16_t wanted, uint16_t read) {
  const auto equals = [&](uint16_t x) { return ((x ^ wanted) & read) == 0; };
  int64_t i = 0;
  for (; i + 16 < count; i += 16) {
    uint16_t found = 0;
    for (int64_t k = 0; k < 16; ++k) found |= equals(bits[i + k]) ? 0xffff : 0;
    if (found) break;
  }
  return std::find_if(bits + i, bits + count, equals) - bits;
}

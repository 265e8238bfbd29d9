// One fault of each kind: what `make sanitize` must find before it says that there is none.
#include <limits>
#include <vector>

#include <omp.h>

volatile int after = 8, most = std::numeric_limits<int>::max();

extern "C" int address() {
  int* few = new int[8]();
  const int read = few[after];
  delete[] few;
  return read;
}

extern "C" int undefined() { return most + 1; }

extern "C" int thread() {
  int sum = 0;
#pragma omp parallel num_threads(2)
  for (int i = 0; i < 1000; ++i) sum += omp_get_thread_num();
  return sum;
}

// The same sum without the race, which must pass.
extern "C" int none() {
  std::vector<int> sums(2);
#pragma omp parallel num_threads(2)
  for (int i = 0; i < 1000; ++i) sums[omp_get_thread_num()] += 1;
  return sums[0] + sums[1] - 2000;
}

// OpenMP's parallel region, of threads that ThreadSanitizer knows.
//
// GCC calls `GOMP_parallel` for it, and libgomp's threads wait for each other by means that
// ThreadSanitizer does not see: each of our writes would be a race with the next region's. Linked
// into the module, what is here takes the place of libgomp's for our own code; torch keeps libgomp.
#include <thread>
#include <vector>

#include <ATen/Parallel.h>

namespace {
thread_local int number = 0, together = 1;
}

#define EM_HIDDEN __attribute__((visibility("hidden")))

extern "C" {

EM_HIDDEN void GOMP_parallel(void (*body)(void*), void* context, unsigned asked, unsigned) {
  const int count = asked ? int(asked) : at::get_num_threads();
  const auto run = [=](int own) {
    const int before = number, group = together;
    number = own, together = count;
    body(context);
    number = before, together = group;
  };
  std::vector<std::thread> others;
  for (int own = 1; own < count; ++own) others.emplace_back(run, own);
  run(0);
  for (auto& thread : others) thread.join();
}

EM_HIDDEN int omp_get_thread_num() { return number; }
EM_HIDDEN int omp_get_num_threads() { return together; }

}  // extern "C"

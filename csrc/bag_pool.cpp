#include "bag_pool.h"

#include <vector>

#define BAGSSL_BODY "bag_pool_body.h"
#define BAGSSL_UP_TO_AVX2  // it waits for memory: vectors of 64 bytes gain nothing
#include "simd_levels.h"

namespace bagssl {

template <typename T>
void bag_pool(const Bags<T>& bags, const BagStatistics<T>& out, ThreadPool& pool) {
  const auto forward_of = BAGSSL_PICK(forward<T>);
  std::vector<std::vector<T>> squares(pool.size(), std::vector<T>(bags.patches));
  pool.parallel_for(
      bags.batch, [&](int worker, int64_t b) { forward_of(bags, out, b, squares[worker].data()); });
}

template <typename T>
void bag_pool_backward(const Bags<T>& bags, const BagGradient<T>& gradient, T* dx,
                       ThreadPool& pool) {
  const auto backward_of = BAGSSL_PICK(backward<T>);
  std::vector<std::vector<T>> base(pool.size(), std::vector<T>(bags.dim));
  pool.parallel_for(bags.batch, [&](int worker, int64_t b) {
    backward_of(bags, gradient, b, base[worker].data(), dx);
  });
}

template void bag_pool(const Bags<float>&, const BagStatistics<float>&, ThreadPool&);
template void bag_pool(const Bags<double>&, const BagStatistics<double>&, ThreadPool&);
template void bag_pool_backward(const Bags<float>&, const BagGradient<float>&, float*, ThreadPool&);
template void bag_pool_backward(const Bags<double>&, const BagGradient<double>&, double*,
                                ThreadPool&);

}  // namespace bagssl

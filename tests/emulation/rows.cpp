// The row kernels on the CPU against float64: rows DTYPE SOFTCAP WRITE VOCAB RANKS.
#include "cuda/row_kernel.cuh"

#include "check.hpp"

using namespace r1k;

template <class T, bool kSoftcap>
int run(bool write, int V, int ranks) {
  constexpr int kRows = 7, kBytes = 16 / T::kPerUnit;
  Random random;
  const int stride = (V + 15) / 16 * 16;
  const double step = T::kPerUnit == 4 ? 0x1p-22 : std::is_same_v<T, Half> ? 0x1p-10 : 0x1p-7;
  std::vector<uint4> storage(kRows * stride / T::kPerUnit), outs(storage.size());
  char* logits = reinterpret_cast<char*>(storage.data());
  char* out = reinterpret_cast<char*>(outs.data());
  std::vector<int64_t> targets(kRows);
  std::vector<float> per_tau(kRows), dlogp(kRows), dentropy(kRows), dlse(kRows);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < V; ++v) T::store(logits + r * stride * kBytes, v, 3 * random.normal());
    targets[r] = r == 0 ? V - 1 : r == 3 ? -100 : r == 5 ? V : random.below(V);
    if (r == 1 && V > 40)
      for (int v = 0; v < V / 2; ++v)
        if (v != targets[r]) T::store(logits + r * stride * kBytes, v, -INFINITY);
    if (r == 4) T::store(logits + r * stride * kBytes, targets[r], 40.0f);
    per_tau[r] = r == 6 ? -1.0f : 0.5f + random.uniform();
    dlogp[r] = random.normal(), dentropy[r] = random.normal(), dlse[r] = random.normal();
  }
  std::vector<double> logp(kRows, NAN), entropy(kRows, NAN), lse(kRows, NAN);
  RowArgs args = {logits, write ? logits : nullptr, kRows, V, stride, stride, targets.data(),
                  per_tau.data(), 0.75f, kSoftcap ? 6.0f : 0.0f, 1, dlogp.data(), dentropy.data(),
                  dlse.data(), logp.data(), entropy.data(), lse.data()};
  const std::vector<uint4> before = storage;
  if (write)
    ptx::launch(int64_t{kRows} * ranks, ranks, kRowThreads,
                [&] { row_forward_kernel<T, kSoftcap, true>(args); });
  else
    ptx::launch(int64_t{kRows} * ranks, ranks, kRowThreads,
                [&] { row_forward_kernel<T, kSoftcap, false>(args); });

  // The backward of its own, from terms worked out here.
  std::vector<float> anchor(kRows), alpha(kRows), beta(kRows), at_target(kRows);
  Worst worst;
  std::vector<std::vector<double>> truth(kRows);
  for (int r = 0; r < kRows; ++r) {
    const char* row = reinterpret_cast<const char*>(before.data()) + r * stride * kBytes;
    truth[r].assign(V, 0.0);
    if (targets[r] < 0) {
      worst.exact("ignored", logp[r], 0), worst.exact("ignored", entropy[r], 0);
      worst.exact("ignored", lse[r], 0);
      continue;
    }
    if (r >= 5) {
      worst.undefined("logp", logp[r]), worst.undefined("entropy", entropy[r]);
      worst.undefined("lse", lse[r]);
      truth[r].assign(V, NAN);
      anchor[r] = alpha[r] = beta[r] = at_target[r] = NAN;
      continue;
    }
    std::vector<double> l(V), slope(V);
    double top = -INFINITY, sum = 0, mean = 0, rest = 0;
    for (int v = 0; v < V; ++v) {
      const double x = T::load(row, v) * 0.75, t = std::tanh(x / 6);
      l[v] = (kSoftcap ? 6 * t : x) * per_tau[r];
      slope[v] = (kSoftcap ? 1 - t * t : 1) * 0.75 * per_tau[r];
      top = std::max(top, l[v]);
    }
    for (int v = 0; v < V; ++v) sum += std::exp(l[v] - top);
    for (int v = 0; v < V; ++v) {
      if (v != targets[r]) rest += std::exp(l[v] - l[targets[r]]);
      if (std::isfinite(l[v])) mean += std::exp(l[v] - top) / sum * l[v];
    }
    const double total = top + std::log(sum), H = total - mean, y = -std::log1p(rest);
    worst.add("logp", logp[r], y, 2e-6 * std::min(1.0, std::fabs(y)) + 4e-7 * std::fabs(y));
    worst.add("entropy", entropy[r], H, 4e-6);
    worst.add("lse", lse[r], total, 2e-6);
    for (int v = 0; v < V; ++v) {
      const double p = std::exp(l[v] - total);
      if (p > 0)
        truth[r][v] = slope[v] * ((v == targets[r] ? dlogp[r] : 0) +
                                  p * (dlse[r] - dlogp[r] - dentropy[r] * (l[v] - mean)));
    }
    if (truth[r][targets[r]] != 0)
      truth[r][targets[r]] =
          slope[targets[r]] * (-dlogp[r] * std::expm1(y) + std::exp(y) * dlse[r] -
                               dentropy[r] * std::exp(y) * (y + H));
    anchor[r] = total;
    const double lost = anchor[r] - total;
    alpha[r] = std::exp(lost) * (dlse[r] - dlogp[r] - dentropy[r] * (H + lost));
    beta[r] = -std::exp(lost) * dentropy[r];
    at_target[r] = truth[r][targets[r]];
  }
  auto compare = [&](const char* what, const char* found) {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < V; ++v) {
        const double x = T::load(found + r * stride * kBytes, v), z = truth[r][v];
        if (std::isnan(z))
          worst.undefined(what, x);
        else
          worst.add(what, x, z, step * std::fabs(z) + 4e-6);
      }
  };
  if (write) compare("dlogits in place", logits);
  args.logits = before.data(), args.out = out;
  args.anchor = anchor.data(), args.alpha = alpha.data(), args.beta = beta.data();
  args.at_target = at_target.data();
  ptx::launch(kRows * row_blocks(V, T::kPerUnit), 1, kRowThreads,
              [&] { row_backward_kernel<T, kSoftcap>(args); });
  compare("dlogits", out);
  return worst.verdict();
}

int main(int count, char** words) {
  if (count != 6) return 2;
  const int dtype = std::atoi(words[1]), soft = std::atoi(words[2]);
  auto go = [&](auto kernel) {
    return kernel(std::atoi(words[3]) != 0, std::atoi(words[4]), std::atoi(words[5]));
  };
  if (dtype == 0) return soft ? go(run<Float, true>) : go(run<Float, false>);
  if (dtype == 1) return soft ? go(run<Bf16, true>) : go(run<Bf16, false>);
  return soft ? go(run<Half, true>) : go(run<Half, false>);
}

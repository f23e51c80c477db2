// head_kernel on the CPU against float64: head MODE SOFTCAP ENTROPY C V D RANKS CLUSTERS.
#include "cuda/head_kernel.cuh"

#include "check.hpp"

using namespace r1k;

template <int kMode, bool kSoftcap, bool kEntropy>
int run(int C, int V, int D, int ranks, int clusters) {
  Random random;
  const int stride = D + 8, columns = (V + 15) / 16 * 16;
  const int tiles_v = (V + HeadShape::kTileV - 1) / HeadShape::kTileV;
  const int step = HeadShape::kTileC * ranks, tiles_c = (C + step - 1) / step;
  std::vector<uint16_t> hidden(C * stride), weight(V * stride);
  for (auto& x : hidden) x = ptx::round_bf16(random.normal());
  for (auto& x : weight) x = ptx::round_bf16(random.normal() * 2 / std::sqrt(float(D)));
  std::vector<float> bias(V), anchor(C), per_tau(C), alpha(C), beta(C), centre(C);
  for (auto& x : bias) x = random.normal();
  std::vector<int64_t> targets(C);
  for (int c = 0; c < C; ++c) {
    targets[c] = c == 1 ? -1 : c == 2 ? V - 1 : random.below(V);
    anchor[c] = random.normal(), per_tau[c] = 0.5f + random.uniform();
    alpha[c] = random.normal(), beta[c] = random.normal(), centre[c] = random.normal();
  }
  const int planes = (kMode != kGradient) * (1 + kEntropy) + (kMode != kSums);
  std::vector<float> partial(int64_t{planes} * tiles_v * C, NAN);
  std::vector<uint16_t> out(int64_t{C} * columns + 64, 0xbeef);
  const float scale = 1.25f, softcap = kSoftcap ? 3.0f : 0.0f;
  const HeadArgs args = {targets.data(), anchor.data(), per_tau.data(), bias.data(), alpha.data(),
                         beta.data(), centre.data(), out.data(), partial.data(), C, V,
                         (D + 63) / 64, columns, scale, softcap, {tiles_c, tiles_v, 2}};
  const ptx::TensorMap hidden_map = {hidden.data(), C, D, stride, HeadShape::kTileC};
  const ptx::TensorMap weight_map = {weight.data(), V, D, stride, HeadShape::kTileV / ranks};
  ptx::launch(std::min(clusters, args.order.count()) * ranks, ranks, kHeadThreads,
              [&] { head_kernel<kMode, kSoftcap, kEntropy>(hidden_map, weight_map, args); });

  Worst worst;
  auto wide = [](uint16_t x) { return double(ptx::bits(uint32_t{x} << 16)); };
  for (int c = 0; c < C; ++c) {
    for (int tile = 0; tile < tiles_v; ++tile) {
      double s = 0, u = 0, residue = 0, size = 0;
      for (int v = tile * HeadShape::kTileV; v < std::min(columns, (tile + 1) * HeadShape::kTileV);
           ++v) {
        double z = v < V ? bias[v] : 0, value = 0;
        if (v < V && v != targets[c]) {
          for (int d = 0; d < D; ++d) z += wide(hidden[c * stride + d]) * wide(weight[v * stride + d]);
          const double x = kSoftcap ? softcap * std::tanh(z * scale / softcap) : z * scale;
          const double d = x * per_tau[c] - anchor[c], e = std::exp(d);
          const double slope = kSoftcap ? 1 - x * x / (softcap * softcap) : 1;
          s += e, u += e * d, size += std::fabs(e * d);
          value = kMode == kStore ? e * slope
                                  : e * slope * (alpha[c] + beta[c] * (d + centre[c]));
        }
        if (kMode == kSums) continue;
        const double stored = wide(out[int64_t{c} * columns + v]);
        if (v >= V || v == targets[c]) worst.exact("empty entry", stored, 0);
        worst.add("stored entry", stored, value, 0x1p-8 * std::fabs(value) + 1e-5);
        residue += value - stored;
      }
      auto at = [&](int plane) { return partial[partial_index(plane, tile, c, tiles_v, C)]; };
      int plane = 0;
      if (kMode != kGradient) worst.add("s", at(plane++), s, 2e-5 * s + 1e-7);
      if (kMode != kGradient && kEntropy) worst.add("u", at(plane++), u, 2e-5 * (size + s) + 1e-7);
      if (kMode != kSums) worst.add("residue", at(plane++), residue, 1e-3 * (s + 1));
    }
  }
  for (size_t i = int64_t{C} * columns; i < out.size(); ++i) worst.exact("beyond", out[i], 0xbeef);
  return worst.verdict();
}

int main(int count, char** words) {
  if (count != 9) return 2;
  const int mode = std::atoi(words[1]), soft = std::atoi(words[2]), entropy = std::atoi(words[3]);
  auto go = [&](auto kernel) {
    return kernel(std::atoi(words[4]), std::atoi(words[5]), std::atoi(words[6]),
                  std::atoi(words[7]), std::atoi(words[8]));
  };
  if (mode == kSums && !soft && !entropy) return go(run<kSums, false, false>);
  if (mode == kSums && soft && entropy) return go(run<kSums, true, true>);
  if (mode == kStore && !soft && entropy) return go(run<kStore, false, true>);
  if (mode == kStore && soft && !entropy) return go(run<kStore, true, false>);
  if (mode == kGradient && !soft) return go(run<kGradient, false, false>);
  if (mode == kGradient && soft) return go(run<kGradient, true, false>);
  return 2;
}

// Random numbers, and the worst difference found.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>

struct Random {
  std::mt19937 engine{7};
  float uniform() { return std::uniform_real_distribution<float>()(engine); }
  float normal() { return std::normal_distribution<float>()(engine); }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % n); }
};

struct Worst {
  double share = 0;  // of what is allowed
  int64_t checked = 0;
  void add(const char* what, double found, double truth, double allowed) {
    ++checked;
    const double now = std::fabs(found - truth) / allowed;
    if (now <= share) return;
    share = std::isnan(now) ? INFINITY : now;
    std::printf("%s %.9g, truth %.9g, %.3g of what is allowed\n", what, found, truth, share);
  }
  void exact(const char* what, double found, double truth) {
    ++checked;
    if (found == truth) return;
    share = INFINITY;
    std::printf("%s %.9g, not %.9g\n", what, found, truth);
  }
  void undefined(const char* what, double found) {
    ++checked;
    if (std::isnan(found)) return;
    share = INFINITY;
    std::printf("%s %.9g, not NaN\n", what, found);
  }
  int verdict() const { return checked > 0 && share <= 1 ? 0 : 1; }
};

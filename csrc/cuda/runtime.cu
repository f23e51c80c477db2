// Errors, and whether this machine can run the build.
#include <stdexcept>

#include "cuda/kernels.hpp"

namespace r1k {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  // Taken from the runtime, so that the next call does not report it again.
  cudaGetLastError();
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

std::string refusal(int device) {
  int driver = 0, major = 0, minor = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "no CUDA driver";
  }
  // A newer runtime of the same major version works on an older driver; a new major one does not.
  if (driver / 1000 < CUDART_VERSION / 1000)
    return "built for CUDA " + std::to_string(CUDART_VERSION / 1000) + ", the driver has " +
           std::to_string(driver / 1000);
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    cudaGetLastError();
    return std::string("cudaGetDeviceCount: ") + cudaGetErrorString(status);
  }
  if (device >= count) return "no GPU";
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "cudaDeviceGetAttribute");
  if (major == 9 && minor == 0) return "";
  return "built for sm_90a, the GPU is sm_" + std::to_string(10 * major + minor);
}

}  // namespace r1k

// blas.cc: cuBLAS and cuFFT of the null CUDA: every function that torch takes from it succeeds and leaves a line with
// the small numbers among its first arguments, which for a matrix product are its sizes. CUBLAS_NAMES, made when this
// is built, is a file with one CALL(name) for each of them, without those written out here.
#include <cstring>
#include <string>

#include "null_cuda.h"

namespace {

// The first six integer arguments are in registers, so every function can be called as if it had six.
long call(const char* name, long a, long b, long c, long d, long e, long f) {
  if (null_cuda::standing_error()) return 14;  // CUBLAS_STATUS_INTERNAL_ERROR
  if (!null_cuda::recording()) return 0;
  std::string line = name;
  const bool product = strstr(name, "emm") || strstr(name, "Gemm") || strstr(name, "trsm") || strstr(name, "gemv");
  if (!product) return null_cuda::record(line, nullptr), 0;  // what the other registers hold is anybody's guess
  for (long value : {a, b, c, d, e, f}) {
    int small = int(value);
    bool pointer = value > 0xffffffffL || value < -0x80000000L;
    line += pointer ? std::string(" *") : " " + std::to_string(small);
  }
  null_cuda::record(line, nullptr);
  return 0;
}

}  // namespace

#define CALL(name) \
  NULL_CUDA_API long name(long a, long b, long c, long d, long e, long f) { return call(#name, a, b, c, d, e, f); }
#include CUBLAS_NAMES

NULL_CUDA_API int cublasCreate_v2(void** handle) {
  static int it;
  *handle = &it;
  return null_cuda::standing_error() ? 1 : 0;
}
NULL_CUDA_API int cublasDestroy_v2(void*) { return 0; }
NULL_CUDA_API size_t cublasLtGetVersion() { return 130000; }
NULL_CUDA_API int cublasGetVersion_v2(void*, int* out) {
  *out = 130000;
  return 0;
}
NULL_CUDA_API int cublasSetStream_v2(void*, void* stream) {
  static thread_local void* last = nullptr;
  if (stream != last && null_cuda::recording())
    null_cuda::record("cublas stream " + std::to_string(uintptr_t(stream)), nullptr);
  last = stream;
  return 0;
}
NULL_CUDA_API int cublasGetPointerMode_v2(void*, int* out) {
  *out = 0;
  return 0;
}
NULL_CUDA_API int cublasGetMathMode(void*, int* out) {
  *out = 0;
  return 0;
}
// One algorithm, in the caller's first result; sizes are logged by the matmul that follows.
NULL_CUDA_API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*,
                                                 int* found) {
  *found = 1;
  return 0;
}

// ---- cuFFT: plans of no size, and executions that are logged

NULL_CUDA_API int cufftCreate(int* plan) {
  static int plans = 0;
  *plan = ++plans;
  return 0;
}
NULL_CUDA_API int cufftDestroy(int) { return 0; }
NULL_CUDA_API int cufftSetAutoAllocation(int, int) { return 0; }
NULL_CUDA_API int cufftSetStream(int, void*) { return 0; }
NULL_CUDA_API int cufftSetWorkArea(int, void*) { return 0; }
NULL_CUDA_API int cufftXtMakePlanMany(int, int rank, long long* n, long long*, long long, long long, int in, long long*,
                                      long long, long long, int out, long long batch, size_t* work, int execution) {
  *work = 0;
  if (!null_cuda::recording()) return 0;
  std::string line = "cufft plan of";
  for (int i = 0; i < rank; ++i) line += " " + std::to_string(n[i]);
  for (long long value : {(long long)in, (long long)out, batch, (long long)execution})
    line += " " + std::to_string(value);
  null_cuda::record(line, nullptr);
  return 0;
}
NULL_CUDA_API int cufftXtExec(int, void*, void*, int direction) {
  null_cuda::record("cufft " + std::to_string(direction), nullptr);
  return 0;
}

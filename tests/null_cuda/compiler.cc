// compiler.cc: NVRTC of the null CUDA, for torch's kernels that are compiled at run time: every program compiles, to a
// module without a word in it whose kernel has the name that was asked for.
#include <cstring>
#include <string>

#include "null_cuda.h"

NULL_CUDA_API int nvrtcVersion(int* major, int* minor) {
  *major = 13, *minor = 0;
  return 0;
}
NULL_CUDA_API int nvrtcCreateProgram(std::string** out, const char*, const char*, int, const char**, const char**) {
  *out = new std::string("run-time compiled");
  return 0;
}
NULL_CUDA_API int nvrtcDestroyProgram(std::string** program) {
  delete *program;
  return 0;
}
NULL_CUDA_API int nvrtcAddNameExpression(std::string* program, const char* name) {
  *program = name;
  return 0;
}
NULL_CUDA_API int nvrtcGetLoweredName(std::string* program, const char*, const char** out) {
  *out = program->c_str();
  return 0;
}
NULL_CUDA_API int nvrtcCompileProgram(std::string*, int, const char**) { return 0; }
NULL_CUDA_API int nvrtcGetCUBINSize(std::string*, size_t* out) {
  *out = sizeof(long) * 8;
  return 0;
}
NULL_CUDA_API int nvrtcGetCUBIN(std::string*, char* out) {
  memset(out, 0, sizeof(long) * 8);
  return 0;
}
NULL_CUDA_API int nvrtcGetPTXSize(std::string* program, size_t* out) { return nvrtcGetCUBINSize(program, out); }
NULL_CUDA_API int nvrtcGetPTX(std::string* program, char* out) { return nvrtcGetCUBIN(program, out); }
NULL_CUDA_API int nvrtcGetProgramLogSize(std::string*, size_t* out) {
  *out = 1;
  return 0;
}
NULL_CUDA_API int nvrtcGetProgramLog(std::string*, char* out) {
  *out = 0;
  return 0;
}
NULL_CUDA_API const char* nvrtcGetErrorString(int) { return "an error of the null CUDA"; }

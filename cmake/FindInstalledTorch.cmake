# FindInstalledTorch.cmake: the torch that this Python imports, as CMake targets.
#
# torch's own CMake package asks for a CUDA toolkit with a compiler as soon as torch is a CUDA build. Headers and the
# libraries in the wheel are all that is needed here, so the targets are made by hand.
execute_process(
  COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/installed_torch.py
  OUTPUT_VARIABLE torch_facts RESULT_VARIABLE torch_result OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "torch_fl needs an installed torch: ${Python3_EXECUTABLE} cannot import it. "
                      "Install torch first and build with --no-build-isolation.")
endif()
list(GET torch_facts 0 TORCH_VERSION)
list(GET torch_facts 1 torch_root)
list(GET torch_facts 2 TORCH_CUDA_VERSION)
list(GET torch_facts 3 torch_cuda_includes)
string(REPLACE "|" ";" torch_cuda_includes "${torch_cuda_includes}")
message(STATUS "torch ${TORCH_VERSION} in ${torch_root}, CUDA ${TORCH_CUDA_VERSION}")

function(add_torch_target name)
  add_library(${name} INTERFACE)
  target_include_directories(${name} SYSTEM INTERFACE
    ${torch_root}/include ${torch_root}/include/torch/csrc/api/include)
  foreach(library IN LISTS ARGN)
    target_link_libraries(${name} INTERFACE ${torch_root}/lib/lib${library}.so)
  endforeach()
endfunction()

add_torch_target(torch_cpu_lib c10 torch_cpu)
add_torch_target(torch_python_lib torch_python)

set(cuda_kernel "$ENV{CUDA_KERNEL}")
if(TORCH_CUDA_VERSION STREQUAL "none")
  message(STATUS "torch is a CPU build: libtorch_fl_cuda.so is left out")
elseif(cuda_kernel MATCHES "^(OFF|0)$")
  message(STATUS "CUDA_KERNEL=${cuda_kernel}: libtorch_fl_cuda.so is left out")
elseif(torch_cuda_includes STREQUAL "none")
  message(WARNING "torch is a CUDA ${TORCH_CUDA_VERSION} build, but CUDA's headers (cuda_runtime_api.h, "
                  "crt/host_config.h) were not found: libtorch_fl_cuda.so is left out. Set CUDA_HOME or install the "
                  "wheels nvidia-cuda-runtime and nvidia-cuda-crt.")
else()
  add_torch_target(torch_cuda_lib c10_cuda torch_cuda)
  target_include_directories(torch_cuda_lib SYSTEM INTERFACE ${torch_cuda_includes})
endif()

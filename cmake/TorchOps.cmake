# moetuner_ops: the library behind torch.ops.moetuner, when torch is installed.
#
# torch is looked up without find_package(Torch), which wants a CUDA toolkit for a CUDA torch even
# where none is needed. -I hides the PYTHONPATH of an isolated build, so that the torch of the
# environment which moetuner is installed into is found.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -I -c
    "import importlib.util as u; s = u.find_spec('torch'); print(list(s.submodule_search_locations)[0] if s else '')"
  OUTPUT_VARIABLE torch_dir
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET)

if(NOT torch_dir OR NOT EXISTS "${torch_dir}/lib/libtorch_cpu.so")
  message(STATUS "moetuner: torch is not installed, building the planner without torch ops")
  return()
endif()

set(torch_libraries torch torch_cpu c10)
set(with_cuda OFF)
if(NOT EXISTS "${torch_dir}/lib/libtorch_cuda.so")
  if(MOETUNER_CUDA STREQUAL "ON")
    message(FATAL_ERROR "moetuner: MOETUNER_CUDA=ON, but the torch in ${torch_dir} is a CPU build")
  endif()
  message(STATUS "moetuner: the installed torch is a CPU build, building ops without GPU kernels")
elseif(MOETUNER_HAVE_CUDA)
  set(with_cuda ON)
  list(APPEND torch_libraries torch_cuda c10_cuda)
  message(STATUS "moetuner: building ops with GPU kernels")
endif()

# The twins see no torch header: one that slips in does not compile.
file(GLOB twin_sources CONFIGURE_DEPENDS csrc/cpu/*.cpp)
if(with_cuda)
  find_package(CUDAToolkit REQUIRED)
  file(GLOB kernel_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/transport/*.cpp)
  list(APPEND twin_sources ${kernel_sources})
endif()
add_library(moetuner_twins OBJECT ${twin_sources})
target_include_directories(moetuner_twins PRIVATE csrc/include)
target_link_libraries(moetuner_twins PRIVATE moetuner_warnings)
if(with_cuda)
  target_include_directories(moetuner_twins SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
endif()

file(GLOB op_sources CONFIGURE_DEPENDS csrc/torch/*.cpp)
add_library(moetuner_ops SHARED ${op_sources} $<TARGET_OBJECTS:moetuner_twins>)
target_include_directories(moetuner_ops PRIVATE csrc/include)
target_include_directories(moetuner_ops SYSTEM PRIVATE
  "${torch_dir}/include" "${torch_dir}/include/torch/csrc/api/include")
target_link_directories(moetuner_ops PRIVATE "${torch_dir}/lib")
target_link_libraries(moetuner_ops PRIVATE ${torch_libraries} moetuner_warnings)
# GCC 13 sees array bounds overstepped inside torch's autograd headers once they are inlined.
target_compile_options(moetuner_ops PRIVATE
  $<$<CXX_COMPILER_ID:GNU>:-Wno-array-bounds -Wno-stringop-overflow>)
# Some toolchains have only a static C++ runtime. Exported, it would mix with the one that torch
# brings, and the first error message crash; hidden, it is our own business.
target_link_options(moetuner_ops PRIVATE LINKER:--exclude-libs,ALL)
if(with_cuda)
  target_compile_definitions(moetuner_ops PRIVATE MOETUNER_WITH_CUDA)
  target_link_libraries(moetuner_ops PRIVATE CUDA::cudart)
  target_include_directories(moetuner_ops SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
endif()
install(TARGETS moetuner_ops LIBRARY DESTINATION moetuner/ops)

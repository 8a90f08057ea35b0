# The planning core: plain C++, no torch, no pybind11. Also built alone, by tests/cpp.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
option(MOETUNER_WERROR "Treat warnings as errors" OFF)

# What every C++ target of ours is compiled with; third-party headers come in as SYSTEM includes.
add_library(moetuner_warnings INTERFACE)
target_compile_options(moetuner_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra $<$<BOOL:${MOETUNER_WERROR}>:-Werror>>)

find_package(Threads REQUIRED)
set(moetuner_csrc "${CMAKE_CURRENT_LIST_DIR}/../csrc")
file(GLOB planning_sources CONFIGURE_DEPENDS
  "${moetuner_csrc}/planning/*.cpp" "${moetuner_csrc}/planning/*/*.cpp")
add_library(moetuner_planning STATIC ${planning_sources})
target_include_directories(moetuner_planning
  PUBLIC "${moetuner_csrc}/include" PRIVATE "${moetuner_csrc}")
target_link_libraries(moetuner_planning PUBLIC Threads::Threads PRIVATE moetuner_warnings)
# The same sums whichever vectors a machine has: a plan is decided by its seed.
target_compile_options(moetuner_planning PRIVATE -ffp-contract=off)
